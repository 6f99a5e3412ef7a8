"""What a person who opens Prefect's deployments reads there."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.utilities.callables import parameter_schema_from_entrypoint

from twinloop.common.strict_yaml import parse_yaml

DEPLOYMENTS = parse_yaml((Path(__file__).parents[2] / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_a_deployment_and_each_of_its_parameters_explain_themselves(deployment: dict[str, str]) -> None:
    assert len(deployment["description"].split()) > 15
    schema = parameter_schema_from_entrypoint(deployment["entrypoint"])
    assert list(schema.properties) == ["recipe"]
    for parameter in schema.properties.values():
        assert "relative to the project" in parameter["description"]
