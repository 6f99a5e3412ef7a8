"""What is wrong between a recipe and its domain is reported before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from twinloop.common.errors import UserError
from twinloop.tasks.context import Context
from twinloop.tasks.recipe import load_recipe

PROJECT = Path(__file__).parents[2]


class Unwatched:
    def started(self, stage: str) -> None: ...

    def stepped(self, stage: str, done: float, total: float, metrics: object) -> None: ...

    def finished(self, stage: str, *, seconds: float | None, name: str) -> None: ...


def test_a_split_key_that_the_domain_has_not_is_refused_by_its_name(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((PROJECT / "recipes" / "tiny.yaml").read_text().replace("order_id", "ordr_id"))
    with pytest.raises(UserError) as raised:
        Context.of(tmp_path, recipe, load_recipe(recipe), Unwatched())
    assert str(raised.value) == f"{recipe}: validate.split_keys: 'ordr_id' is no split key; did you mean order_id?"
