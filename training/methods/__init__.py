"""Training methods, one file each; `training/method.py` defines what one holds."""
