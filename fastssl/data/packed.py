"""Decoded pictures in memory-mapped shards: written once by `fastssl-data pack`, read as `data`.

A folder holds pack.json, and for each shard N two files: N.pixels, the pixels of one picture after
the other, uint8 [H, W, 3], and N.json, which describes them. Each is written under another name
and renamed, N.json last: a shard that is described is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastssl.data.decode import BrokenImage, Pixels
from fastssl.data.index import Names, write_whole
from fastssl.data.pictures import Pictures, ShardWindow

MANIFEST = "pack.json"
_KIND, _FORMAT = "fastssl-data pack", 1
# Names that a checksum of all names is made of; those of a shard are read for each of them.
_NUM_NAMES = 4096
_BLOCK = 2**24  # bytes that are read at a time for a checksum


@dataclass
class Options:
    """What a pack is made of, and how; the same for as long as it is added to.

    data: as the trainer's. number: of its pictures; names: a checksum of what they are called.
    shortest_side: the longest that the shorter side of a picture may be, None for any.
    shard_bytes: from which on a shard is full.
    """

    data: str
    number: int
    names: str
    shortest_side: int | None = None
    shard_bytes: int = 2**29


@dataclass
class Shard:
    """What N.json says: of the pictures their names and shapes; next: where in the data the next
    shard begins; broken: {name: reason} of what was left out since the last one."""

    names: list[str] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    next: int = 0
    bytes: int = 0
    sha256: str = ""


class Damaged(ValueError):
    """A pack, or a shard of it, is not as it was written."""


def is_pack(folder: str | os.PathLike[str]) -> bool:
    """Whether it says so; some other pack.json may lie in a folder of pictures."""
    try:
        text = (Path(folder).expanduser() / MANIFEST).read_text(encoding="utf-8")
        return json.loads(text)["kind"] == _KIND
    except (OSError, ValueError, TypeError, KeyError):
        return False


def read_manifest(folder: Path) -> tuple[Options, list[str] | None]:
    """The options, and the checksums of what describes the shards; None where the data was not
    written to the end. ValueError for what is no pack."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = content["format"]
        if found != _FORMAT:
            raise ValueError(
                f"{folder} must be a pack of format {_FORMAT}, got {found}: it was written by "
                "another version of fastssl"
            )
        return Options(**content["options"]), content["shards"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise Damaged(f"{folder / MANIFEST} is not what fastssl-data writes: {error!r}") from error


def read_shards(folder: Path) -> Iterator[Shard]:
    """Every shard that is described, in order. Damaged where one is not as it was written, but for
    the values of its pixels."""
    _, checksums = read_manifest(folder)
    number = 0
    while (file := folder / f"{number:05d}.json").is_file() or number < len(checksums or ()):
        try:
            content = file.read_bytes()
            if checksums is not None and checksums[number] != hashlib.sha256(content).hexdigest():
                raise ValueError("it has another checksum")
            shard = Shard(**json.loads(content))
        except (OSError, TypeError, ValueError, IndexError) as error:
            raise Damaged(f"{file} is not what fastssl-data wrote: {error!r}") from error
        pixels = file.with_suffix(".pixels")
        found = pixels.stat().st_size if pixels.is_file() else 0
        if found != shard.bytes:
            raise Damaged(f"{pixels} has {found} of {shard.bytes} bytes; pack it anew")
        yield shard
        number += 1


def verify(folder: Path, progress: Callable[[int], object] = lambda size: None) -> list[str]:
    """What is wrong with the shards, a sentence each, by their checksums; all of them are read."""
    wrong = []
    for number, shard in enumerate(read_shards(folder)):
        file = folder / f"{number:05d}.pixels"
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                progress(len(block))
        if digest.hexdigest() != shard.sha256:
            wrong.append(f"{file} does not have the checksum that it was written with")
    return wrong


def pack(
    pictures: Pictures,
    folder: Path,
    options: Options,
    *,
    num_workers: int = 0,
    progress: Callable[[int], object] = lambda number: None,
) -> dict[str, str]:
    """Write what is not there yet; {name: reason} of the pictures that cannot be read.

    progress: called with how many of the pictures are done since the last time.

    Raises:
        ValueError: the folder holds a pack of other options, or something else.
        OSError: a shard cannot be written; those before it stay.
    """
    begin, number, broken = _begin(folder, options)
    progress(begin)
    loader = DataLoader(
        _Decoded(pictures, options.shortest_side),
        batch_size=None,
        sampler=range(begin, options.number),
        num_workers=num_workers,
        collate_fn=tuple,
        worker_init_fn=_start_worker,
    )
    samples = enumerate(loader, begin)
    done = begin
    while done < options.number:
        writing = folder / f"{number:05d}.pixels.writing"
        try:
            shard = Shard(next=done)
            with open(writing, "wb") as stream:
                _fill(shard, stream, samples, options, progress)
                with _said(writing):
                    stream.flush()
                    os.fsync(stream.fileno())
            with _said(writing):
                os.replace(writing, folder / f"{number:05d}.pixels")
                _write_json(folder / f"{number:05d}.json", asdict(shard))
        finally:
            writing.unlink(missing_ok=True)
        broken |= shard.broken
        done, number = shard.next, number + 1
    checksums = [
        hashlib.sha256((folder / f"{i:05d}.json").read_bytes()).hexdigest() for i in range(number)
    ]
    _write_json(folder / MANIFEST, _manifest(options, checksums))
    return broken


def _begin(folder: Path, options: Options) -> tuple[int, int, dict[str, str]]:
    """Where in the data to go on, the shard's number, and what was broken before."""
    if not (folder / MANIFEST).is_file():
        # What a killed one leaves before its manifest is there.
        if folder.exists() and not (folder.is_dir() and all(map(_is_part, folder.iterdir()))):
            raise FileExistsError(f"OUT must be new, or a pack to go on with; {folder} is neither")
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / MANIFEST, _manifest(options, None))
        return 0, 0, {}
    there, _ = read_manifest(folder)
    for name, wanted in vars(options).items():
        if (found := getattr(there, name)) != wanted:
            raise ValueError(
                f"{name} must be {found} to go on with {folder}, got {wanted}; --overwrite begins "
                "anew"
            )
    begin, broken, shards = 0, {}, list(read_shards(folder))
    for shard in shards:
        begin, broken = shard.next, broken | shard.broken
    return begin, len(shards), broken


@contextmanager
def _said(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{file} could not be written: {error}; the same command goes on after the shards "
            "that are there"
        ) from error


def _fill(
    shard: Shard,
    stream: BinaryIO,
    samples: Iterator[tuple[int, tuple[torch.Tensor | None, str, str]]],
    options: Options,
    progress: Callable[[int], object],
) -> None:
    digest = hashlib.sha256()
    for position, (pixels, name, reason) in samples:
        if pixels is None:
            shard.broken[name] = reason
        else:
            content = pixels.numpy().data
            with _said(Path(stream.name)):
                stream.write(content)
            digest.update(content)
            shard.names.append(name)
            shard.shapes.append(tuple(pixels.shape[:2]))
            shard.bytes += content.nbytes
        shard.next = position + 1
        progress(1)
        if shard.bytes >= options.shard_bytes:
            break
    shard.sha256 = digest.hexdigest()


def _is_part(file: Path) -> bool:
    return file.name.startswith(f"{MANIFEST}.") and file.suffix == ".part"


def remove(folder: Path) -> None:
    """Delete the files of a pack, and the folder if nothing else is in it."""
    for file in [*folder.glob("[0-9]*.pixels*"), *folder.glob("[0-9]*.json*")]:
        file.unlink()
    for file in folder.glob(f"{MANIFEST}*"):
        file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def checksum_of_names(pictures: Pictures) -> str:
    """Of all names, or of many that are evenly spaced."""
    number = min(len(pictures), _NUM_NAMES)
    names = [pictures.path(i * len(pictures) // number) for i in range(number)]
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()


def _manifest(options: Options, shards: list[str] | None) -> dict:
    return {"kind": _KIND, "format": _FORMAT, "options": asdict(options), "shards": shards}


def _write_json(file: Path, content: dict) -> None:
    def write(stream: BinaryIO) -> None:
        stream.write(json.dumps(content).encode())
        stream.flush()
        os.fsync(stream.fileno())

    write_whole(file, write)


class _Decoded(Dataset):
    """(pixels, name, "") of a picture, or (None, name, why it cannot be read)."""

    def __init__(self, pictures: Pictures, shortest_side: int | None):
        self.pictures, self.shortest_side = pictures, shortest_side

    def __getitem__(self, position: int) -> tuple[torch.Tensor | None, str, str]:
        try:
            pixels = shrunk(self.pictures.read(position), self.shortest_side)
        except BrokenImage as error:
            return None, error.path, error.reason
        return torch.from_numpy(np.array(pixels)), self.pictures.path(position), ""


def shrunk(pixels: Pixels, shortest_side: int | None) -> Pixels:
    """With a shorter side of at most so many pixels (bicubic, antialiased)."""
    height, width, _ = pixels.shape
    if shortest_side is None or min(height, width) <= shortest_side:
        return pixels
    size = [max(round(side * shortest_side / min(height, width)), 1) for side in (width, height)]
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _start_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process, and the main one says what is to be said.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class PackedImages(Pictures):
    """The pictures of a pack, mapped into memory: in the order of the data, without broken ones.

    shard_window: see `ShardWindow`; what does not fit in memory is then read from the disk shard by
        shard rather than from all over it.

    Raises:
        ValueError: no whole pack: it is damaged, or was not written to the end, or is empty.
    """

    def __init__(self, root: str | os.PathLike[str], shard_window: int = 0):
        root = Path(root).expanduser()
        super().__init__(root)
        if read_manifest(root)[1] is None:
            raise ValueError(
                f"data must be a whole pack; {root} was not written to the end: go on with the "
                "same fastssl-data pack"
            )
        shards = list(read_shards(root))
        shapes = [np.array(shard.shapes, np.int64).reshape(-1, 2) for shard in shards]
        lengths = [3 * shape.prod(1) for shape in shapes]
        self._starts = np.cumsum([0, *map(len, shapes)])
        self._shapes = np.concatenate([np.empty((0, 2), np.int64), *shapes])
        self._offsets = np.concatenate(
            [np.empty(0, np.int64), *(np.cumsum(length) - length for length in lengths)]
        )
        self._names = Names.of(name for shard in shards for name in shard.names)
        if not len(self):
            raise ValueError(f"data must hold at least one readable image; {root} has none")
        for shard in shards:
            self.skipped.update(shard.broken)
        self._mapped: dict[int, np.memmap] = {}
        if 0 < shard_window < len(shards):
            self.window = ShardWindow(self._starts, shard_window)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_mapped": {}}

    def __len__(self) -> int:
        return len(self._shapes)

    def path(self, position: int) -> str:
        return self._names[position]

    def _decode(self, position: int) -> Pixels:
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        if shard not in self._mapped:
            self._mapped[shard] = np.memmap(self.root / f"{shard:05d}.pixels", np.uint8, mode="r")
        height, width = self._shapes[position].tolist()
        begin = int(self._offsets[position])
        pixels = self._mapped[shard][begin : begin + 3 * height * width]
        return np.asarray(pixels).reshape(height, width, 3)
