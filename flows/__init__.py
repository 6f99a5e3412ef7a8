"""What runs, in what order: Prefect flows and the `twinloop` command."""

from models.telemetry import disable_telemetry

disable_telemetry()
