"""How weights change: one loop, one batch type, the objectives. Runs without Prefect and without MLflow."""
