"""How weights change: one loop, one batch type, the objectives. Runs without Prefect and without MLflow."""

from common.telemetry import disable_telemetry

disable_telemetry()
