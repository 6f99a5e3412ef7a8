"""The tokenizer, learned from the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from twinloop.common.errors import UserError
from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report
from twinloop.tasks.recipe import TokenizerSettings

SIDES = ("chosen", "rejected")


@task(name="tokenize", cache_policy=NO_CACHE)
def tokenize(context: Context, settings: TokenizerSettings, *, data: Artifact) -> Artifact:
    """A directory with tokenizer.json and tokenizer_config.json; how long records are stands in the metrics.

    Every demonstration and preference is put through the chat template: the stop token must be trained, and a prompt's
    tokens must begin its conversation's. Raises UserError naming the first that fails, before any training.
    """

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.models.tokenizer import check_template, train_tokenizer
        from twinloop.records.validated import read_records, source_line
        from twinloop.tasks.lengths import measure_lengths

        tokenizer = train_tokenizer((r["text"] for r in read_records(data.path, "corpus")), settings.vocab_size)
        conversations = {
            "chat": [record["messages"] for record in read_records(data.path, "chat")],
            "preferences": [
                [*record["prompt"], {"role": "assistant", "content": record[side]}]
                for record in read_records(data.path, "preferences")
                for side in SIDES
            ],
        }
        for name, examples in conversations.items():
            checked = check_template(tokenizer, examples)
            if not checked.passed:
                first = checked.problems[0]
                row = first.index // len(SIDES) if name == "preferences" else first.index
                file, line = source_line(data.path, name, row)
                raise UserError(
                    f"data/{file} line {line}: {first.problem}; {len(checked.problems)} of {checked.examples} would be "
                    "trained wrongly"
                )
        tokenizer.save(out)
        heldout = [record["text"] for record in read_records(data.path, "corpus_heldout")]
        tokens = sum(map(len, tokenizer.encode_batch(heldout)))
        return {
            "vocab_size": tokenizer.vocab_size,
            "bytes_per_token": sum(len(text.encode()) for text in heldout) / max(1, tokens),
            "longest": measure_lengths(tokenizer, data.path),
        }

    return context.run("tokenize", work, settings=settings, inputs={"data": data}, modules=("twinloop.tasks.tokenize",))
