"""How data enters: its version, reading, validation, quarantine, splits."""

DATA_DIR = "data"
DATA_FILE = "data.dvc"
"""What versions it: together they are what a project, or a folder of one, has as its data set."""
