"""What is found out about data once and kept: lists of names, in files of the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from fastssl.data.decode import image_extensions
from fastssl.kernels.common import env

# Part of every key: what older code wrote in another way is not read.
_FORMAT = 1


class Names(Sequence[str]):
    """Many names in one array of bytes, which may be a file mapped into memory.

    A list of a million strings would be copied into every worker as its reference counts change.

    raw: uint8, N as int64, the N ends of the names in the text as int64, the text, zeros up to a
        multiple of 8 bytes.
    """

    def __init__(self, raw: np.ndarray):
        raw = self.raw = np.asarray(raw)
        number = int(raw[:8].view(np.int64)[0])
        self._ends = raw[8 : 8 + 8 * number].view(np.int64)
        self._text = raw[8 + 8 * number :]

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(encoded), *map(len, encoded)], dtype=np.int64)
        ends[1:] -= len(encoded)
        text = b"".join(encoded)
        text += bytes(-len(text) % 8)
        return cls(np.concatenate([ends.view(np.uint8), np.frombuffer(text, np.uint8)]))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position: int) -> str:
        if not 0 <= position < len(self):
            raise IndexError(f"position must be in [0, {len(self)}), got {position}")
        start = int(self._ends[position - 1]) if position else 0
        return os.fsdecode(self._text[start : int(self._ends[position])].tobytes())


def cache_file(kind: str, *key: object) -> Path:
    """Where something of this kind and key is kept, whether it is there or not."""
    # Another Pillow may find other images in the same place.
    parts = repr((_FORMAT, sorted(image_extensions()), key))
    return env.cache_dir() / kind / hashlib.sha256(parts.encode()).hexdigest()[:32]


def write_whole(file: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Make `file`, so that whoever else looks sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with open(part, "wb") as stream:
            write(stream)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process or thread of this machine at a time for `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f"{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
