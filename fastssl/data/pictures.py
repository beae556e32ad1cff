"""Pictures by position, whatever they lie in, and reading them past broken ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from fastssl.data.decode import BrokenImage, Pixels

# A small set of pictures is decoded once; of a large one, only a share stays in memory.
_CACHE_BYTES = 64 * 2**20


class NoReadableImage(ValueError):
    """Not one picture of the data can be read as an image."""


@dataclass(frozen=True)
class ShardWindow:
    """Of pictures that lie in shards: an epoch reads about `num_open` shards at a time.

    starts: [S + 1] int64, the position of the first picture of each shard, then their number.
    """

    starts: np.ndarray
    num_open: int


class Pictures(ABC):
    """A fixed list of pictures, read by position.

    A broken picture is replaced by the next readable one in the list, whichever process reads it,
    so that a batch never depends on the number of workers. `skipped` maps each broken one met by
    this process to the reason.

    root: where they are, for messages.
    shortest_side: see `decode_image`.
    window: None where any order is as good as another.
    """

    window: ShardWindow | None = None

    def __init__(self, root: object, shortest_side: int | None = None):
        self.root = root
        self._shortest_side = shortest_side
        self.skipped: dict[str, str] = {}
        self._broken: dict[int, str] = {}
        self._cache: dict[int, Pixels] = {}
        self._cached_bytes = 0
        self._last: tuple[int, Pixels] | None = None

    def __getstate__(self) -> dict:
        # Pixels are not worth sending to a worker that is spawned rather than forked.
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0, "_last": None}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def path(self, position: int) -> str:
        """The name of a picture, for messages."""

    @abstractmethod
    def _decode(self, position: int) -> Pixels:
        """The RGB image at `position`. BrokenImage where it cannot be read."""

    @property
    def num_near(self) -> int:
        """How many, from the first, can be picked from at random without fetching all there is."""
        return len(self)

    def read(self, position: int) -> Pixels:
        """The RGB image at `position`. BrokenImage where it cannot be read."""
        if position in self._cache:
            return self._cache[position]
        # Several crops of one picture are asked for in a row.
        if self._last is not None and self._last[0] == position:
            return self._last[1]
        if position in self._broken:
            raise BrokenImage(self.path(position), self._broken[position])
        try:
            image = self._decode(position)
        except BrokenImage as error:
            self.skipped[error.path] = self._broken[position] = error.reason
            raise
        self._last = (position, image)
        if self._cached_bytes + image.nbytes <= _CACHE_BYTES:
            self._cache[position] = image
            self._cached_bytes += image.nbytes
        return image

    def read_or_next(self, position: int) -> tuple[int, Pixels]:
        """The first readable image from `position` on, round the end of the list, and where it is.

        Raises:
            NoReadableImage: there is none.
        """
        return first_readable(self, "image", position, self.read)


class Source(Protocol):
    """Files by position, and what of them was broken."""

    root: object
    skipped: dict[str, str]

    def __len__(self) -> int: ...


Found = TypeVar("Found")


def first_readable(
    source: Source, kind: str, position: int, read: Callable[[int], Found]
) -> tuple[int, Found]:
    """The first position from this one on, round the end, that `read` can read, and what it gives.

    Raises:
        NoReadableImage: there is none.
    """
    for step in range(len(source)):
        candidate = (position + step) % len(source)
        try:
            return candidate, read(candidate)
        except BrokenImage:
            continue
    reasons = "\n".join(f"  {p}: {r}" for p, r in list(source.skipped.items())[:5])
    raise NoReadableImage(
        f"data must hold at least one readable {kind} file; none of the {len(source)} {kind} files "
        f"in {source.root} can be read. The first of them:\n{reasons}"
    )


class NewlySkipped:
    """What a source has more of broken files than when this was asked before: a worker's own list
    reaches the main process with its batches."""

    def __init__(self, source: Source):
        self._source = source
        self._number = 0

    def __call__(self) -> dict[str, str] | None:
        new = dict(list(self._source.skipped.items())[self._number :])
        self._number = len(self._source.skipped)
        return new or None
