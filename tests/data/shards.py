"""Pictures as files, and tar shards of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def png(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """Noise of its own for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path: Path, members: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, pictures: Sequence[bytes], per_shard: int) -> Path:
    """000.tar, 001.tar, ... as WebDataset writes them, with a label and a caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(pictures), per_shard):
        members = {}
        for i, content in enumerate(pictures[first : first + per_shard], first):
            members |= {f"{i:05d}.cls": b"7", f"{i:05d}.png": content, f"{i:05d}.json": b"{}"}
        write_shard(folder / f"{first // per_shard:03d}.tar", members)
    return folder
