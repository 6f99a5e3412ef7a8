"""Ids to text, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence


class DecoderStream:
    """Incremental decoding: the pushed texts and `finish()` together are what `decode` of the same answer gives."""

    def __init__(self, bytes_of: Sequence[bytes], stop_ids: Collection[int], *, drops_first_space: bool = False):
        self._bytes_of = bytes_of
        self._stop_ids = stop_ids
        self._drops_space = drops_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Text that is certain after this token; empty while a character is unfinished, and for a stop token."""
        return "" if id in self._stop_ids else self.push_bytes(self._bytes_of[id])

    def push_bytes(self, piece: bytes) -> str:
        text = self._decoder.decode(piece)
        if not (text and self._drops_space):
            return text
        self._drops_space = False
        return text.removeprefix(" ")

    def finish(self) -> str:
        """What an unfinished character at the end is shown as (U+FFFD), or nothing."""
        return self._decoder.decode(b"", final=True)
