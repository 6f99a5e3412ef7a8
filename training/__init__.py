"""How weights change: one loop, one batch type, the objectives. Runs without Prefect and without MLflow."""

from twinloop.common.telemetry import disable_telemetry

disable_telemetry()
