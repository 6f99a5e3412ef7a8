"""What every package uses: errors, telemetry, strict YAML, files."""
