"""Pictures in tar shards, as WebDataset writes them, read by position.

A shard's index, the place of every picture in it, is made once and kept in the cache. A picture is
then one read at an offset, so that any order, any number of ranks and any step to resume at cost
the same. Shards behind a URL are fetched whole into the cache, when first needed.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np

from fastssl.data import fetch
from fastssl.data.decode import BrokenImage, Pixels, decode_bytes, image_extensions
from fastssl.data.index import Names, cache_file, locked, write_whole
from fastssl.data.pictures import Pictures, ShardWindow
from fastssl.kernels.common import env

# Shards that are looked through at a time: most of it is waiting for a disk or a server.
_NUM_THREADS = 8
# What a file raises that is missing or was cut off.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, BadZipFile)
# Of one process; the files themselves may be many.
_NUM_OPEN = 64


def expand_braces(text: str) -> list[str]:
    """{000..099} and {a,b}, as a shell expands them: "{0..1}{a,b}" is 0a, 0b, 1a, 1b."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not ends:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = ends.groups()
    if int(first) > int(last):
        raise ValueError(f"data must have {{first..last}} with first <= last, got {{{inside}}}")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def find_shards(data: str) -> list[str] | None:
    """The shards that `data` names: URLs, .tar files with braces, or a folder of .tar files.

    None where it names something else: what does not end in .tar, or a folder that holds an image
    or a folder beside its .tar files, if it has any.
    """
    if fetch.is_url(data):
        # Braces are common in the commands of pipes too.
        return expand_braces(data)
    path = Path(data).expanduser()
    if path.is_dir():
        return _tars_of(path)
    return expand_braces(str(path)) if path.suffix == ".tar" else None


def _tars_of(folder: Path) -> list[str] | None:
    tars, extensions = [], image_extensions()
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if suffix in extensions or entry.is_dir():
                return None
            if suffix == ".tar":
                tars.append(entry.path)
    return sorted(tars) or None


@dataclass(frozen=True)
class ShardIndex:
    """Of the P pictures of one shard of `size` bytes: offsets and lengths [P] int64, names."""

    size: int
    offsets: np.ndarray
    lengths: np.ndarray
    names: Names


class ShardImages(Pictures):
    """The images of tar shards by position, shard after shard.

    An image is every member with an image's extension that is not hidden; labels and whatever else
    lies beside it are passed over. Memory: 16 bytes per image, and the names only when asked for.

    Args:
        shards: paths and URLs.
        root: what they are called together, for messages.
        shard_window: shards that an epoch reads from at a time, 0 for all; see `ShardWindow`.

    Raises:
        ValueError: a shard is missing, no uncompressed tar, damaged, or without images; the cache
            has no room for the shards that are read at a time.
        ImportError: URLs need the package webdataset.
        OSError: a URL cannot be read.
    """

    def __init__(
        self,
        shards: Sequence[str],
        root: str,
        shortest_side: int | None = None,
        shard_window: int = 0,
    ):
        super().__init__(root, shortest_side)
        self.shards = tuple(shards)
        if missing := [s for s in self.shards if not fetch.is_url(s) and not os.path.isfile(s)]:
            raise ValueError(
                f"data must name shards that are there; of {len(self.shards)}, {len(missing)} do "
                f"not exist: {', '.join(missing[:5])}"
            )
        indices = _indices(self.shards)
        self._starts = np.cumsum([0, *(len(index.offsets) for index in indices)])
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._lengths = np.concatenate([index.lengths for index in indices])
        self._sizes = [index.size for index in indices]
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        if 0 < shard_window < len(self.shards):
            self.window = ShardWindow(self._starts, shard_window)
        self._check_room(shard_window or len(self.shards))

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def num_near(self) -> int:
        return int(self._starts[1]) if fetch.is_url(self.shards[0]) else len(self)

    def path(self, position: int) -> str:
        shard = self._shard_of(position)
        member = read_index(self.shards[shard]).names[position - int(self._starts[shard])]
        return f"{self.shards[shard]}/{member}"

    def _decode(self, position: int) -> Pixels:
        length, offset = int(self._lengths[position]), int(self._offsets[position])
        file = self._file(self._shard_of(position))
        try:
            content = os.pread(file.fileno(), length, offset)
            return decode_bytes(content, "", self._shortest_side)
        except (OSError, BrokenImage) as error:
            reason = error.reason if isinstance(error, BrokenImage) else str(error)
            raise BrokenImage(self.path(position), reason) from error

    def _shard_of(self, position: int) -> int:
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def _file(self, shard: int) -> BinaryIO:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        name = self.shards[shard]
        file = fetch.open_fetched(name, self._sizes[shard]) if fetch.is_url(name) else None
        # What the cache has let go keeps its place on the disk for as long as it is open.
        gone = [s for s, f in self._open.items() if not os.fstat(f.fileno()).st_nlink]
        for old in gone or list(self._open)[: max(len(self._open) + 1 - _NUM_OPEN, 0)]:
            self._open.pop(old).close()
        self._open[shard] = open(name, "rb") if file is None else file
        return self._open[shard]

    def _check_room(self, num_open: int) -> None:
        sizes = [size for s, size in zip(self.shards, self._sizes, strict=True) if fetch.is_url(s)]
        # One more is begun while the last of another are read.
        wanted = sum(sorted(sizes)[-(num_open + 1) :])
        if wanted > env.cache_bytes():
            raise ValueError(
                "loader.shard_window must be so small that the cache holds the shards read at a "
                f"time, or FASTSSL_CACHE_GB larger; {min(num_open + 1, len(sizes))} shards of data "
                f"take {wanted / 1e9:.3g} GB, got room for {env.cache_bytes() / 1e9:.3g}"
            )


def _indices(shards: Sequence[str]) -> list[ShardIndex]:
    from tqdm import tqdm

    bar = {"total": len(shards), "unit": " shards", "desc": "indexing", "delay": 2, "disable": None}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        running = [pool.submit(read_index, shard) for shard in shards]
        try:
            return [future.result() for future in tqdm(running, **bar)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_index(shard: str) -> ShardIndex:
    """The index of one shard, from the cache or else made now and kept there."""
    if fetch.is_url(shard):
        key: tuple = (shard,)
    else:
        status = os.stat(shard)
        key = (os.path.abspath(shard), status.st_size, status.st_mtime_ns)
    kept = cache_file("shards", *key).with_suffix(".npz")
    try:
        return _load(kept)
    except _UNREADABLE:
        pass
    if not fetch.is_url(shard):
        with open(shard, "rb") as file:
            return _make_index(shard, file, kept)
    # Of several ranks one fetches, and the others find what it made.
    with locked(kept):
        try:
            return _load(kept)
        except _UNREADABLE:
            with fetch.open_fetched(shard) as file:
                try:
                    return _make_index(shard, file, kept)
                except ValueError:
                    # A page that says what is wrong with the server, perhaps: not to be kept.
                    fetch.forget(shard)
                    raise


def _load(kept: Path) -> ShardIndex:
    with np.load(kept) as saved:
        names = Names(saved["names"])
        return ShardIndex(int(saved["size"]), saved["offsets"], saved["lengths"], names)


def _make_index(shard: str, file: BinaryIO, kept: Path) -> ShardIndex:
    extensions = image_extensions()
    found: list[tuple[int, int, str]] = []
    try:
        # "r:" refuses what is compressed: nothing can be read from the middle of that.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep them all
                base = os.path.basename(member.name)
                if not member.isreg() or base.startswith("."):
                    continue
                if os.path.splitext(base)[1].lower() in extensions:
                    found.append((member.offset_data, member.size, member.name))
            _check_end(tar)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"data must be whole, uncompressed tar shards; {shard} is not: {error}"
        ) from error
    if not found:
        raise ValueError(f"data must have an image in every shard; {shard} has none")
    offsets, lengths, names = zip(*found, strict=True)
    index = ShardIndex(
        os.fstat(file.fileno()).st_size,
        np.array(offsets, np.int64),
        np.array(lengths, np.int64),
        Names.of(names),
    )
    arrays = {**vars(index), "names": index.names.raw}
    try:
        write_whole(kept, lambda stream: np.savez(stream, **arrays))
    except OSError:
        pass  # a cache that cannot be written is done without
    return index


def _check_end(tar: tarfile.TarFile) -> None:
    """A block of zeros; tarfile takes a damaged header in the middle, or no more bytes, for one."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"there is neither a header nor an end at byte {tar.offset}")
