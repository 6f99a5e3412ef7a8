"""Lifecycle stages: each turns input artifacts into one output artifact.

Their Prefect tasks have `persist_result=False`, which also turns Prefect's cache off: results are artifacts of the
store.
"""

from twinloop.common.telemetry import disable_telemetry

disable_telemetry()
