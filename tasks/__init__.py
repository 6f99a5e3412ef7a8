"""Lifecycle stages: each turns input artifacts into one output artifact."""

from models.telemetry import disable_telemetry

disable_telemetry()
