"""What exists and which one serves: artifacts, MLflow runs and versions, the promotion ledger, the champion."""

from twinloop.common.proxies import bypass_proxies
from twinloop.common.telemetry import disable_telemetry

disable_telemetry()
bypass_proxies()
