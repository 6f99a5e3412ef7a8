"""The figures of a story: which there are, and that each can be read."""

from __future__ import annotations

import io
import re

import pytest
from stories import curve, stage, story

from twinloop.report.drawing import png, svg
from twinloop.report.figures import figures, training_panels


def test_a_story_has_a_figure_of_everything_that_was_measured() -> None:
    drawn = figures(story())
    assert list(drawn) == [
        "training_sft", "training_dpo", "pass_rates", "confusion", "reliability", "serving", "lineage",
    ]  # fmt: skip
    assert [panel.title for panel in drawn["training_dpo"]] == [
        "Loss (dpo)",
        "Preference margin (dpo)",
        "own_metric (dpo)",
    ]


def test_what_was_not_measured_has_no_figure() -> None:
    bare = story(stages=(stage("validate"), stage("gate", "validate")), outcomes={}, confidences=(), load=None)
    assert list(figures(bare)) == ["lineage"]


@pytest.mark.parametrize("name", figures(story()))
def test_a_figure_is_a_picture_with_words_in_it_and_the_same_each_time(name: str) -> None:
    from PIL import Image

    panels = figures(story())[name]
    picture = Image.open(io.BytesIO(png(panels)))
    assert picture.width >= 500
    assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255), "its own ground, whatever the page's is"
    for panel in panels:
        drawn = svg(panel)
        assert panel.title in drawn
        assert "currentColor" in drawn, "on a page it takes the text's colour"
        assert not re.search(r"https?://(?!www\.w3\.org)", drawn)
        assert svg(panel) == drawn


@pytest.mark.parametrize("values", [(0.0, 0.0), (1e-9, 2e-9), (1e9, 3.0, 2.0), tuple(range(3000))])
def test_curves_of_any_size_are_drawn(values: tuple[float, ...]) -> None:
    for panel in training_panels(stage("sft", curves={"loss": curve(*values), "learning_rate": curve(*values)})):
        assert "optimizer step" in svg(panel)


def test_the_lineage_names_every_artifact_by_its_content() -> None:
    told = story()
    [panel] = figures(told)["lineage"]
    drawn = svg(panel)
    for made in told.stages:
        assert (made.digest or "")[:10] in drawn
    assert "returns version 7" in drawn
    assert "gate: BLOCK" in drawn
