"""What the gate will say for certain before anything is trained: of the cases, and of the forms that it limits."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

from twinloop.common.errors import UserError
from twinloop.evaluation.gate import GateRules
from twinloop.evaluation.parity_report import LLAMA_CPP
from twinloop.evaluation.rules import PARITY
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context
from twinloop.tasks.recipe import CUDA_ONLY, Recipe
from twinloop.training.runtime import Runtime

if TYPE_CHECKING:
    from twinloop.evaluation.outlook import Outlook

log = logging.getLogger(__name__)


def foresee_gate(context: Context, recipe: Recipe, rules: GateRules, *, data: Artifact) -> Outlook:
    """What the rules need of what the release is measured on. Raises UserError where no model can pass them."""
    from twinloop.evaluation.cases import read_cases
    from twinloop.evaluation.outlook import foresee
    from twinloop.records.validated import has_records, read_records
    from twinloop.tasks.measure import held_out_pairs
    from twinloop.training.forms import prompt_digest

    makers = [stage for stage in recipe.train if stage.method.kind == "reward" or stage.settings.reward_models()]
    pairs = held_out_pairs(data.path) if makers else []
    if makers and not pairs:
        raise UserError(
            f"{makers[0].place}: none of the preferences is held out to measure a reward model on (one of ten prompts, "
            "by its hash); add some, of more prompts"
        )
    outlook = foresee(
        rules,
        read_cases(read_records(data.path, "cases"), context.domain),
        has_texts=has_records(data.path, "corpus_heldout"),
        samples=recipe.evaluate.samples,
        kind=recipe.kind,
        held_out_prompts=len({prompt_digest(pair) for pair in pairs}),
    )
    for warning in outlook.warnings:
        log.warning("%s", warning)
    return outlook


def foresee_forms(recipe: Recipe, runtime: Runtime, rules: GateRules) -> None:
    """Warns of exported forms that have no limits.

    Raises UserError for a limited form that this run cannot compare here, since what is not measured blocks.
    """
    from twinloop.tasks.llama_cpp import SERVER

    last = recipe.train[-1].settings.lora
    reasons = {"merged": None if last and not last.merge else "the last stage of training keeps no adapter to merge"}
    reasons[LLAMA_CPP] = None if shutil.which(SERVER) else f"{SERVER} is not on the path"
    if runtime.device == "cpu":
        reasons |= {form: "only CUDA runs it, and this run is on CPU" for form in CUDA_ONLY}
    problems = [f"{PARITY}.{form}: {reason}" for form in rules.forms if (reason := reasons.get(form))]
    if problems:
        raise UserError(f"{rules.source}: no model can pass: {'; '.join(problems)}")
    if free := [form for form in recipe.export.on(runtime.device) if form not in rules.forms]:
        log.warning("%s: no limits under `%s` for %s: nothing blocks what differs in it",
                    rules.source, PARITY, " and ".join(free))  # fmt: skip
