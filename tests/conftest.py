"""What every test needs before the libraries are imported: no telemetry, no network."""

from twinloop.common.telemetry import disable_telemetry

disable_telemetry()
