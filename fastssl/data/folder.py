"""Images of a folder of any depth."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from fastssl.data.decode import Pixels, decode_image, image_extensions
from fastssl.data.index import Names, cache_file, write_whole
from fastssl.data.pictures import Pictures

# A shorter list is made again faster than it is worth a file.
_WORTH_KEEPING = 10_000
# A folder that changed within this time may change again under the same time stamp.
_SETTLED_NS = 2 * 10**9

# For messages.
_WELL_KNOWN = (".jpg", ".png", ".webp", ".tif", ".mp4", ".mkv", ".webm", ".wav", ".flac", ".mp3")


def list_images(data: str | os.PathLike[str]) -> tuple[Path, list[str], dict[str, str]]:
    """`find_images` with the files as a list of strings, for what is done to each of them."""
    root, names, unreadable = find_images(data)
    return root, list(names), unreadable


def find_images(data: str | os.PathLike[str]) -> tuple[Path, Names, dict[str, str]]:
    """`find_files` of images."""
    return find_files(data, "image", image_extensions(), "'photos' or a folder of images")


def find_files(
    data: str | os.PathLike[str], kind: str, extensions: Collection[str], wanted: str
) -> tuple[Path, Names, dict[str, str]]:
    """Every file of a kind below a folder, by its extension in any case, at any depth.

    Hidden files and folders are left out. Links are followed; a folder reached twice is read once.
    A long list is kept in the cache and read from there as long as no folder's time of change is
    another.

    Returns:
        The folder; the files relative to it, sorted; {path: reason} of the subfolders that cannot
        be listed.

    kind, extensions: what the files are called, and lower-case with the dot. wanted: in messages.

    Raises:
        ValueError: `data` does not exist, is not a folder, or holds no such file.
    """
    root = Path(data).expanduser()
    if not root.exists():
        raise ValueError(f"data must be {wanted}; {root} does not exist")
    if not root.is_dir():
        raise ValueError(f"data must be {wanted}; {root} is a file")
    kept = cache_file("folders", os.path.realpath(root), *([] if kind == "image" else [kind]))
    names = _kept(root, kept)
    if names is not None:
        return root, names, {}
    start = time.time_ns()
    files, folders, unreadable = _walk(root, kind, extensions)
    if not files:
        examples = ", ".join([e for e in _WELL_KNOWN if e in extensions] or sorted(extensions))
        raise ValueError(
            f"data must be a folder with at least one {kind} file; {root} has none "
            f"(looked for {len(extensions)} extensions such as {examples})"
        )
    names = Names.of(sorted(files))
    settled = max(folders.values()) < start - _SETTLED_NS
    if len(names) >= _WORTH_KEEPING and settled and not unreadable:
        _keep(kept, names, folders)
    return root, names, unreadable


def _walk(
    root: Path, kind: str, extensions: Collection[str]
) -> tuple[list[str], dict[str, int], dict[str, str]]:
    """The files; {folder: its time of change in ns}, both relative to root; what is unreadable.

    The kind of an entry comes with its folder's list; only links cost a look of their own.
    """
    from tqdm import tqdm

    files: list[str] = []
    folders: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    stack = [""]
    with tqdm(unit=f" {kind} files", desc=f"listing {root}", delay=2, disable=None) as bar:
        while stack:
            prefix = stack.pop()
            folder = root / prefix
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[prefix] = status.st_mtime_ns
            before = len(files)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                unreadable[str(folder)] = error.strerror or str(error)
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    stack.append(f"{prefix}{entry.name}/")
                elif os.path.splitext(entry.name)[1].lower() in extensions and _may_be_file(entry):
                    files.append(prefix + entry.name)
            bar.update(len(files) - before)
    return files, folders, unreadable


def _is_folder(entry: os.DirEntry) -> bool:
    # os.path rather than the entry's method: a link to itself is no error there.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _may_be_file(entry: os.DirEntry) -> bool:
    if not entry.is_symlink():
        return entry.is_file()
    # A dangling link is kept, to be reported as broken; a pipe would block.
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _keep(kept: Path, names: Names, folders: dict[str, int]) -> None:
    """One file: the bytes of names, the times of change, the folders; lengths first."""
    of_folders = Names.of(folders).raw
    lengths = np.array([len(names.raw), len(folders)], np.int64)
    times = np.array(list(folders.values()), np.int64)
    raw = np.concatenate([lengths.view(np.uint8), names.raw, times.view(np.uint8), of_folders])
    try:
        write_whole(kept, lambda stream: np.save(stream, raw))
    except OSError:
        pass  # a cache that cannot be written is done without


def _kept(root: Path, kept: Path) -> Names | None:
    """The names as they were kept, mapped into memory, if all folders are as they were."""
    try:
        raw = np.load(kept, mmap_mode="r")
        length, num_folders = raw[:16].view(np.int64).tolist()
        rest = raw[16 + length :]
        times = rest[: 8 * num_folders].view(np.int64).tolist()
        for folder, changed in zip(Names(rest[8 * num_folders :]), times, strict=True):
            if os.stat(root / folder).st_mtime_ns != changed:
                return None
    except (OSError, ValueError, EOFError):
        return None
    return Names(raw[16 : 16 + length])


class ImageFiles(Pictures):
    """Image files by position; `files` are relative to `root`."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        files: Sequence[str],
        shortest_side: int | None = None,
    ):
        super().__init__(Path(root), shortest_side)
        self._files = files if isinstance(files, Names) else Names.of(files)

    def __len__(self) -> int:
        return len(self._files)

    def path(self, position: int) -> str:
        return str(self.root / self._files[position])

    def _decode(self, position: int) -> Pixels:
        return decode_image(self.path(position), self._shortest_side)
