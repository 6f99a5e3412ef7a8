"""Lifecycle stages: each turns input artifacts into one output artifact."""

from twinloop.common.telemetry import disable_telemetry

disable_telemetry()
