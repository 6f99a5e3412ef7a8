"""BM25 over an inverted index that can be changed document by document."""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter

K1, B = 1.2, 0.75
"""Term saturation and length normalisation, the usual values (Robertson and Zaragoza, 2009)."""

_WORD = re.compile(r"\w+")
_SUFFIXES = ("ing", "ed", "es", "s", "e")


def terms(text: str) -> list[str]:
    """Lower-case words without their commonest English endings, so that `damages` finds `damaged`."""
    return [_stem(word) for word in _WORD.findall(text.casefold())]


def _stem(word: str) -> str:
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


class Bm25:
    """Scores short documents. Equal scores are ordered by document number, so an answer never depends on chance."""

    def __init__(self) -> None:
        self._postings: dict[str, dict[int, int]] = {}
        self._terms: dict[int, Counter[str]] = {}
        self._total_length = 0

    def put(self, document: int, text: str) -> None:
        """Index a document's text in place of the one it had."""
        for term in self._terms.get(document, ()):
            del self._postings[term][document]
        self._total_length -= self._terms.get(document, Counter()).total()
        counts = self._terms[document] = Counter(terms(text))
        self._total_length += counts.total()
        for term, count in counts.items():
            self._postings.setdefault(term, {})[document] = count

    def search(self, query: str, k: int) -> list[int]:
        """The k best documents, best first. Documents without any word of the query are never found."""
        count = len(self._terms)
        mean_length = self._total_length / count if count else 1.0
        scores: dict[int, float] = {}
        for term in sorted(set(terms(query))):
            postings = self._postings.get(term, {})
            idf = math.log1p((count - len(postings) + 0.5) / (len(postings) + 0.5))
            for document, frequency in postings.items():
                saturation = K1 * (1 - B + B * self._terms[document].total() / mean_length)
                gain = idf * frequency * (K1 + 1) / (frequency + saturation)
                scores[document] = scores.get(document, 0.0) + gain
        return heapq.nsmallest(k, scores, key=lambda document: (-scores[document], document))
