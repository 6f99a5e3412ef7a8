"""What each library reads from the environment to send nothing to its maker. Every package of ours that imports one of
them sets it in its `__init__`, so it is set before the import, whichever module a process begins with."""

from __future__ import annotations

import os

NO_TELEMETRY = {
    # 1.31 looks up its maker's host and keeps a queue of device, model and graph names under the user's cache folder.
    # It does not read DO_NOT_TRACK.
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def disable_telemetry() -> None:
    """Set NO_TELEMETRY for this process and its children, whatever the user's environment sets."""
    os.environ.update(NO_TELEMETRY)
