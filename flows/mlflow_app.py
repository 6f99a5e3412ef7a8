"""MLflow's server for this project's operator: `mlflow server --app-name twinloop`, in the project's folder."""

from __future__ import annotations

from mlflow.server.fastapi_app import app as mlflow_app

from twinloop.flows.guard import ThisMachineOnly, WithSecret
from twinloop.flows.secret import auth_string
from twinloop.tasks.context import find_project

app = ThisMachineOnly(WithSecret(mlflow_app, auth_string(find_project())))
