"""What runs, in what order: Prefect flows and the `twinloop` command."""

from twinloop.common.proxies import bypass_proxies
from twinloop.common.telemetry import disable_telemetry

disable_telemetry()
bypass_proxies()
