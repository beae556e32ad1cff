"""Which name was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, candidates: Iterable[str]) -> str:
    """The candidate most like `word`, as a whole, in its beginning or in its last part."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, word, candidate).ratio()
        leaf = difflib.SequenceMatcher(
            None, word.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1]
        ).ratio()
        begins = (0.9 + 0.1 * whole) * candidate.startswith(word)
        return max(whole, 0.9 * leaf, begins)

    return max(candidates, key=likeness)
