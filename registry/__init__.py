"""What exists and which one serves: artifacts, MLflow runs and versions, the promotion ledger, the champion."""

from common.telemetry import disable_telemetry

disable_telemetry()
