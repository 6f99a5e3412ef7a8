"""An adapter's rank is at most what its matrices can have, which is known before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import write_model

from twinloop.common.errors import UserError
from twinloop.common.strict_yaml import parse_yaml
from twinloop.tasks.base_source import resolve_base
from twinloop.tasks.recipe import load_recipe

TINY = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
BASES = {
    "models/small": {"path": "models/small"},
    "a new network": {"depth": 1, "hidden_size": 32, "num_attention_heads": 2},
}
"""By the title of each. k_proj and v_proj are 16 x 32, since there is one key-value head of 16; no other side is less
than 32."""


@pytest.fixture(params=list(BASES))
def title(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    write_model(tmp_path / "models" / "small", seed=1, positions=512)
    chosen: str = request.param
    return chosen


def resolve(project: Path, title: str, **lora: Any) -> None:
    fields = parse_yaml(TINY.read_text()) | {"base": BASES[title]}
    fields["train"][2]["lora"] = lora
    path = project / "recipe.yaml"
    path.write_text(json.dumps(fields))
    resolve_base(load_recipe(path, project), project)


def test_the_smallest_matrix_among_the_targets_limits_the_rank(tmp_path: Path, title: str) -> None:
    resolve(tmp_path, title, rank=16)
    resolve(tmp_path, title, rank=32, targets=["q_proj", "up_proj"])
    for rank, targets, smallest in ((17, "all-linear", "k_proj"), (100_000, ["up_proj", "v_proj"], "v_proj")):
        with pytest.raises(UserError) as raised:
            resolve(tmp_path, title, rank=rank, targets=targets)
        assert str(raised.value) == (
            f"train[2].lora.rank ({rank}) is more than the 16 that {smallest} of {title} can have (a matrix of 16 x "
            f"32); take at most 16, or targets without {smallest}"
        )
