"""The tokenizer of a network with a head: its prompts are a chat's, and its answers are labels.

The engine draws a label as it draws a token, so an answer is one id, the label's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from twinloop.models.decoder_stream import DecoderStream
from twinloop.models.directory import load_config
from twinloop.models.tokenizer import ChatTokenizer


class LabelTokenizer(ChatTokenizer):
    """Encodes as its network was trained; decodes labels."""

    @classmethod
    def load(cls, directory: Path | str, *, rows: int | None = None) -> Self:
        tokenizer = super().load(directory, rows=rows)
        tokenizer.labels = load_config(Path(directory)).labels
        return tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """None: every label is a whole answer."""
        return ()

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.labels[id] for id in ids)

    def decoder_stream(self, *, continues: bool = False) -> DecoderStream:
        return DecoderStream([label.encode() for label in self.labels], ())


def load_answering(directory: Path) -> ChatTokenizer:
    """What encodes the prompts and decodes the answers of a model directory or an exported model."""
    return (LabelTokenizer if load_config(directory).labels else ChatTokenizer).load(directory)
