"""The tokenizer of a new network, trained on the corpus, or else on the texts of what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefect import task

from twinloop.registry.artifact import Artifact
from twinloop.tasks.context import Context, Report

CORPUS, HELD_OUT = "corpus", "corpus_heldout"


def tokenize_stage(context: Context, vocab_size: int, *, records: Sequence[str], data: Artifact) -> Artifact:
    """A directory with tokenizer.json and tokenizer_config.json. records: the record types that are trained on."""
    sources = (CORPUS,) if CORPUS in records else tuple(sorted(records))
    measured = HELD_OUT if CORPUS in records else None

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from twinloop.models.new_tokenizer import train_tokenizer
        from twinloop.records.validated import read_records
        from twinloop.training.forms import texts

        def all_texts(names: Sequence[str]) -> Iterable[str]:
            return (text for name in names for record in read_records(data.path, name) for text in texts(record))

        tokenizer = train_tokenizer(all_texts(sources), vocab_size)
        tokenizer.save(out)
        metrics: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
        if measured:
            held_out = list(all_texts([measured]))
            tokens = sum(map(len, tokenizer.encode_batch(held_out)))
            metrics["bytes_per_token"] = sum(len(text.encode()) for text in held_out) / max(1, tokens)
        return metrics

    return context.run(
        "tokenize",
        work,
        settings={"vocab_size": vocab_size, "sources": sources},
        inputs={"data": data},
        modules=("twinloop.tasks.tokenize",),
    )


tokenize = task(name="tokenize", persist_result=False)(tokenize_stage)
