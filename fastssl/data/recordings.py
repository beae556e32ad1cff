"""Files of sound or moving pictures by position, and reading past broken ones."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar

from fastssl.data.decode import BrokenImage
from fastssl.data.folder import find_files
from fastssl.data.pictures import first_readable


class Recordings(ABC):
    """Every file of a kind in a folder, at any depth, sorted.

    A file that cannot be read is replaced by the next one that can, in any process alike;
    `skipped` maps it to the reason.

    Raises:
        ValueError: `data` does not exist, is not a folder, or holds no such file.
    """

    kind: ClassVar[str]
    extensions: ClassVar[Collection[str]]
    window = None  # for GlobalOrder: any order is as good as another

    def __init__(self, data: str | os.PathLike[str]):
        found = find_files(data, self.kind, self.extensions, f"a folder of {self.kind} files")
        self.root, self._names, unreadable = found
        self.skipped: dict[str, str] = dict(unreadable)
        self._broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def path(self, position: int) -> str:
        return str(self.root / self._names[position])

    @abstractmethod
    def _read(self, path: str, *wanted: Any) -> Any:
        """What is wanted of a file; any exception where it cannot be read."""

    def read(self, position: int, *wanted: Any) -> Any:
        """What is wanted of a file. BrokenImage, with path and reason, where it cannot be read."""
        path = self.path(position)
        if position in self._broken:
            raise BrokenImage(path, self._broken[position])
        try:
            return self._read(path, *wanted)
        # Decoders raise nearly anything on a damaged file.
        except Exception as error:
            reason = str(error) or type(error).__name__
            self.skipped[path] = self._broken[position] = reason
            raise BrokenImage(path, reason) from error

    def read_or_next(self, position: int, *wanted: Any) -> Any:
        """The same of the first readable file from `position` on, round the end of the list.

        Raises:
            NoReadableImage: there is none.
        """
        return first_readable(self, self.kind, position, lambda at: self.read(at, *wanted))[1]
