"""A method of one's own, a file beside the recipe, from data to the summary table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_project import make_ready_project, recipe_fields, twinloop

BOUNDED = '''"""SFT whose loss is bounded: a mean of 1 - p over the answer's tokens (MAE; Ghosh et al., 2017)."""

from twinloop.training.methods import sft

RECORDS = "chat"
SHOWN = ("probability",)
Settings = sft.Settings


def build(records, model, tokenizer, settings, runtime, domain):
    from twinloop.training.tree import scored_logprobs

    class MeanAbsoluteError:
        def normaliser(self, batch):
            return batch.total_weight

        def loss(self, model, batch):
            mean = (scored_logprobs(model, batch).exp() * batch.weight_N).sum() / batch.total_weight
            return 1 - mean, {"probability": mean.detach()}

    return MeanAbsoluteError(), sft.build(records, model, tokenizer, settings, runtime, domain)[1]
'''


@pytest.mark.slow
def test_a_recipe_with_sft_and_a_method_of_ones_own_runs_end_to_end(tmp_path: Path) -> None:
    project = make_ready_project(tmp_path)
    (project / "mae.py").write_text(BOUNDED)
    fields = recipe_fields()
    sft = next(stage for stage in fields["train"] if stage["method"] == "sft")
    fields["train"] = [sft, sft | {"method": "./mae.py"}, sft]
    (project / "recipes" / "small.yaml").write_text(json.dumps(fields))
    planned = twinloop(project, "plan")
    assert planned.returncode == 0, planned.stderr
    run = twinloop(project, "run")
    assert run.returncode == 0, run.stdout + run.stderr
    for stage in ("sft", "mae", "sft-2"):
        assert re.search(rf"^{stage} ", planned.stdout, re.MULTILINE)
        assert re.search(rf"^✓ {stage} +done in", run.stdout, re.MULTILINE)
        assert re.search(rf"^{stage} +\d+\.\d s", run.stdout, re.MULTILINE)
    (project / "mae.py").write_text(BOUNDED.replace("1 - mean,", "1 - mean.sqrt(),"))
    again = twinloop(project, "run")
    done = set(re.findall(r"^✓ (\S+) +done in", again.stdout, re.MULTILINE))
    assert {"check", "mae", "sft-2"} <= done
    assert not done & {"sft", "base", "tokenize"}
