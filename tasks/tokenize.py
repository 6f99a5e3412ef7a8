"""The tokenizer, learned from the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from models.errors import UserError
from tasks.artifact import Artifact
from tasks.context import Context, Report
from tasks.recipe import TokenizerSettings


@task(name="tokenize", cache_policy=NO_CACHE)
def tokenize(context: Context, settings: TokenizerSettings, longest: int, *, data: Artifact) -> Artifact:
    """A directory with tokenizer.json and tokenizer_config.json.

    Every demonstration and preference is put through the chat template: the stop token must be trained, a prompt's
    tokens must begin its conversation's, and none may be longer than `longest`. Raises UserError naming the first that
    fails, before any training.
    """

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from models.tokenizer import check_template, train_tokenizer
        from tasks.records import read_records

        tokenizer = train_tokenizer((r["text"] for r in read_records(data.path, "corpus")), settings.vocab_size)
        conversations = {
            "sft_examples": [record["messages"] for record in read_records(data.path, "sft_examples")],
            "preference_pairs": [
                [*record["prompt"], {"role": "assistant", "content": record[side]}]
                for record in read_records(data.path, "preference_pairs")
                for side in ("chosen", "rejected")
            ],
        }
        for name, examples in conversations.items():
            checked = check_template(tokenizer, examples, max_length=longest)
            if not checked.passed:
                first = checked.problems[0]
                raise UserError(
                    f"{name}: {len(checked.problems)} of {checked.examples} would be trained wrongly; the first is "
                    f"number {first.index + 1}: {first.problem}; shorten it, or raise row_length and model.max_length"
                )
        tokenizer.save(out)
        heldout = [record["text"] for record in read_records(data.path, "corpus_heldout")]
        tokens = sum(map(len, tokenizer.encode_batch(heldout)))
        return {
            "vocab_size": tokenizer.vocab_size,
            "bytes_per_token": sum(len(text.encode()) for text in heldout) / max(1, tokens),
        }

    return context.run(
        "tokenize",
        work,
        settings={**settings.model_dump(), "longest": longest},
        inputs={"data": data},
        modules=("tasks.tokenize",),
    )
