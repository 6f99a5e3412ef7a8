"""The figures of a story: which there are, and that each can be read."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from stories import curve, stage, story

from twinloop.report.drawing import png, svg
from twinloop.report.figures import figures, training_panels
from twinloop.report.kept import kept_figures


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
    shown = story()
    [panel] = figures(shown)["lineage"]
    drawn = svg(panel)
    for made in shown.stages:
        assert (made.digest or "")[:10] in drawn
    assert "returns version 7" in drawn
    assert "gate: BLOCK" in drawn


def test_a_figure_is_drawn_again_only_where_what_it_shows_has_changed(tmp_path: Path) -> None:
    first = story()
    drawn = kept_figures(tmp_path, first)
    pages = {name: (drawn.svgs(name), drawn.png(name)) for name in drawn.panels}
    kept = sorted(drawn.folder.iterdir())
    for path in kept:
        path.write_bytes(b"kept " + path.read_bytes())

    verified = [each.model_copy(update={"reused": True, "seconds": 9.0, "note": "verified"}) for each in first.stages]
    again = kept_figures(tmp_path, story(stages=tuple(verified), title="another day", mlflow_run="another"))
    for name, (svgs, png_bytes) in pages.items():
        assert again.svgs(name) == [f"kept {each}" for each in svgs]
        assert again.png(name) == b"kept " + png_bytes
    again.drop_others()
    assert sorted(again.folder.iterdir()) == kept

    other = kept_figures(tmp_path, story(outcomes={"yes": {"yes": 1, "no answer": 2}}))
    assert other.svgs("confusion") != again.svgs("confusion")
    assert other.svgs("lineage") == again.svgs("lineage")
    other.drop_others()
    assert not {again.folder / path.name for path in kept} <= set(other.folder.iterdir())
