"""Training methods, one file each; `training/method.py` says what one holds."""
