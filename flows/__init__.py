"""What runs, in what order: Prefect flows and the `twinloop` command."""
