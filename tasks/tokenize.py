"""The tokenizer, learned from the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifact import Artifact
from tasks.context import Context, Report
from tasks.recipe import TokenizerSettings


@task(name="tokenize", cache_policy=NO_CACHE)
def tokenize(context: Context, settings: TokenizerSettings, *, data: Artifact) -> Artifact:
    """A directory with tokenizer.json and tokenizer_config.json."""

    def work(out: Path, keep: Path, report: Report) -> dict[str, Any]:
        from models.tokenizer import train_tokenizer
        from tasks.records import read_records

        tokenizer = train_tokenizer((r["text"] for r in read_records(data.path / "corpus.jsonl")), settings.vocab_size)
        tokenizer.save(out)
        heldout = [record["text"] for record in read_records(data.path / "corpus_heldout.jsonl")]
        tokens = sum(map(len, tokenizer.encode_batch(heldout)))
        return {
            "vocab_size": tokenizer.vocab_size,
            "bytes_per_token": sum(len(text.encode()) for text in heldout) / max(1, tokens),
        }

    return context.run("tokenize", work, settings=settings, inputs={"data": data}, modules=("tasks.tokenize",))
