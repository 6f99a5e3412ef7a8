"""The queue of a scheduler: who waits for a slot, and whose turn it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from operator import attrgetter

from twinloop.serving.engine.stream import Stream

MOST_OVERTAKEN = 7
"""So many requests may be taken before the one that waits longest, because of their priority; then it is next. So one
place of eight goes to who waits longest, whatever else comes."""


class WaitingQueue:
    """The streams of answers that wait. One thread at a time may change it; any may look."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []  # in order of arrival, and never changed but replaced
        self._overtaken = 0  # requests that were taken since the first of them could have been

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._streams)

    def add(self, streams: Iterable[Stream]) -> None:
        self._streams = [*self._streams, *streams]

    def remove(self, streams: Collection[Stream]) -> None:
        self._streams = [stream for stream in self._streams if stream not in streams]

    def choose(self) -> list[Stream]:
        """The answers of the request whose turn it is: by priority, then by arrival. They stay until they are removed;
        a request that is chosen counts as taken."""
        if not self._streams:
            return []
        longest = self._streams[0]
        chosen = min(self._streams, key=attrgetter("priority"))  # of those that are equal the first
        if chosen.prompt is longest.prompt or self._overtaken >= MOST_OVERTAKEN:
            chosen, self._overtaken = longest, 0
        else:
            self._overtaken += 1
        return [stream for stream in self._streams if stream.prompt is chosen.prompt]
