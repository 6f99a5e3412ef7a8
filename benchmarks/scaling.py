"""How well `twinloop plan --budget` foresees a run of several times the compute of any that it was fitted on.

    python -m benchmarks.scaling [recipes/returns.yaml] [--run-tokens 1M] [--times 5]

The small runs are those of the command, in the project's artifacts: what either has made, both find. The large one is
the recipe's own network, on as many tokens as make up the compute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.table import Row, heading, promise, show
from twinloop.common.errors import UserError
from twinloop.evaluation.scaling import Choice, Run, Size, fit_law
from twinloop.flows.display import make_display
from twinloop.tasks.context import Context
from twinloop.tasks.prepare import ready_data
from twinloop.tasks.recipe import load_recipe
from twinloop.tasks.scaling import Measured, measure_runs, open_corpus, small_run
from twinloop.tasks.scaling_plan import parse_tokens

WITHIN = 0.03
"""The error of the predicted loss, relative, that is promised."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/returns.yaml"))
    parser.add_argument("--run-tokens", default="1M", help="of the longest small run")
    parser.add_argument("--times", type=float, default=5.0, help="the compute of the largest small run")
    options = parser.parse_args()
    try:
        rows = list(measure(options.recipe, parse_tokens(options.run_tokens), options.times))
        print(f"{heading('this machine', str(options.recipe))}\n", flush=True)
        show(rows)
    except UserError as error:
        sys.exit(f"error: {error}")


def measure(path: Path, longest: int, times: float) -> Iterator[Row]:
    project = Path.cwd()
    recipe = load_recipe(path, project)
    runtime = recipe.runtime()
    with make_display() as display:
        context, data = ready_data(Context.of(project, path, recipe, display), recipe)
        corpus = open_corpus(context, recipe, data=data)
        runs = measure_runs(context, corpus, runtime, longest, enough=lambda first: None)
        own = corpus.shape(corpus.depth)
        most = max(each.flops * each.tokens for each in runs)
        large = small_run(context, corpus, runtime, depth=own.depth, tokens=round(times * most / own.flops))
    yield from compared(runs, large)


def compared(runs: Sequence[Measured], large: Measured) -> Iterator[Row]:
    """The large run beside what the law of the others says of it."""
    for each in runs:
        yield Row(
            "a small run", f"{each.parameters:,} weights, {each.tokens:,} tokens", f"{each.loss:.4f}", "bits a byte"
        )
    fit = fit_law([Run(each.parameters, each.tokens, each.loss) for each in runs])
    choice = Choice(Size(large.depth, large.parameters, large.flops), large.tokens)
    predicted, (low, high) = choice.loss(fit.law), fit.interval(choice.loss)
    off = predicted / large.loss - 1
    times = large.flops * large.tokens / max(each.flops * each.tokens for each in runs)
    setting = f"{large.parameters:,} weights, {large.tokens:,} tokens, {times:.1f} times the compute"
    yield Row("predicted", f"{setting}; 95%: {low:.4f} to {high:.4f}", f"{predicted:.4f}", "bits a byte")
    yield Row("reached", setting, f"{large.loss:.4f}", "bits a byte")
    yield Row("· predicted to reached", setting, f"{100 * off:+.1f}", "%", promise("within 3", abs(off) <= WITHIN))


if __name__ == "__main__":
    main()
