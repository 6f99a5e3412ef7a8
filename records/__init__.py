"""How data enters: its version, reading, validation, quarantine, splits."""
