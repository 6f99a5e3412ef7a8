"""How frozen weights answer: engine, scheduler, retrieval, decisions, HTTP. Needs no torch."""

from twinloop.common.telemetry import disable_telemetry

disable_telemetry()
