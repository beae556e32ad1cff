"""Files behind URLs, fetched whole into a cache of bounded size.

What is read is what `webdataset.gopen` reads: http, https, gs, sftp, hf and others, and
`pipe:command`, as in "pipe:aws s3 cp s3://bucket/000.tar -". The processes of a machine share the
cache; the files that were opened first go when there is no more room.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from fastssl.data.index import cache_file, locked
from fastssl.kernels.common import env

# Seconds between attempts.
_PAUSES = (1.0, 10.0)


def is_url(name: str) -> bool:
    """Whether it is to be fetched: scheme://... or pipe:..."""
    return re.match(r"[A-Za-z][\w+.-]*://|pipe:", name) is not None


def open_fetched(url: str, size: int | None = None) -> BinaryIO:
    """What is behind `url`, from the cache, fetched if it is not there.

    size: in bytes, where it is known.

    Raises:
        ValueError: it has another size than `size`.
        OSError: it could not be fetched.
        ImportError: the package webdataset is not there.
    """
    file = cache_file("fetched", url)
    while True:
        try:
            opened = open(file, "rb")
        except FileNotFoundError:
            with locked(file):
                if not file.exists():
                    _fetch(url, file)
            continue  # another process may have needed its room at once
        # The time of change orders what goes first.
        os.utime(opened.fileno())
        if size is not None and (found := os.fstat(opened.fileno()).st_size) != size:
            opened.close()
            file.unlink(missing_ok=True)
            raise ValueError(
                f"data must not change; {url} has {found} bytes and had {size} when its index was "
                f"made, which lies in {env.cache_dir() / 'shards'}"
            )
        return opened


def forget(url: str) -> None:
    """Let the next who opens it fetch it anew."""
    cache_file("fetched", url).unlink(missing_ok=True)


def _fetch(url: str, file: Path) -> None:
    try:
        from webdataset import gopen
    except ImportError as error:
        raise ImportError(
            "data behind a URL needs webdataset: pip install 'fastssl[webdataset]'"
        ) from error

    # One process at a time is here for this file: what a killed one left is overwritten.
    part = file.with_name(f"{file.name}.part")
    for attempt in range(len(_PAUSES) + 1):
        try:
            with gopen(url) as source, open(part, "wb") as stream:
                shutil.copyfileobj(source, stream, 2**20)
            os.replace(part, file)
            break
        except Exception as error:  # each scheme has its own
            part.unlink(missing_ok=True)
            if attempt < len(_PAUSES):
                time.sleep(_PAUSES[attempt])
            else:
                reason = str(error) or type(error).__name__
                raise OSError(f"data cannot be fetched from {url}: {reason}") from error
    _make_room(file)


def _make_room(newest: Path) -> None:
    """Delete what was opened first until the rest, `newest` among it, fits."""
    others = []
    for file in newest.parent.iterdir():
        try:
            if not file.suffix and file != newest:
                others.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        except FileNotFoundError:
            continue  # by another process
    room = env.cache_bytes() - newest.stat().st_size - sum(size for _, size, _ in others)
    for _, size, file in sorted(others):
        if room >= 0:
            break
        file.unlink(missing_ok=True)
        room += size
