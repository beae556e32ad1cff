"""Images of a folder of any depth, and reading them past broken files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.data.decode import BrokenImage, decode_image, image_extensions

# A small set of pictures is decoded once; of a large one, only a share stays in memory.
_CACHE_BYTES = 64 * 2**20


class NoReadableImage(ValueError):
    """Not one file of the data can be read as an image."""


def list_images(data: str | os.PathLike[str]) -> tuple[Path, list[str], dict[str, str]]:
    """Every image file below a folder, by its extension in any case, at any depth.

    Hidden files and folders are left out. Links are followed; a folder reached twice is read once.

    Returns:
        The folder; the files relative to it, sorted; {path: reason} of the subfolders that cannot
        be listed.

    Raises:
        ValueError: `data` does not exist, is not a folder, or holds no image file.
    """
    root = Path(data).expanduser()
    if not root.exists():
        raise ValueError(f"data must be 'photos' or a folder of images; {root} does not exist")
    if not root.is_dir():
        raise ValueError(f"data must be 'photos' or a folder of images; {root} is a file")
    extensions = image_extensions()
    files: list[str] = []
    unreadable: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    stack = [root]
    while stack:
        folder = stack.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            unreadable[str(folder)] = error.strerror or str(error)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # os.path rather than the entry's methods: a link to itself is no error there.
            if os.path.isdir(entry.path):
                stack.append(Path(entry.path))
            elif os.path.splitext(entry.name)[1].lower() in extensions:
                # A dangling link is kept, to be reported as broken; a pipe would block.
                if os.path.isfile(entry.path) or not os.path.exists(entry.path):
                    files.append(os.path.relpath(entry.path, root))
    if not files:
        raise ValueError(
            f"data must be a folder with at least one image file; {root} has none "
            f"(looked for {len(extensions)} extensions such as .jpg, .png, .webp, .tif)"
        )
    return root, sorted(files), unreadable


class ImageFiles:
    """A fixed list of image files, read by position.

    A broken file is replaced by the next readable one in the list, whichever process reads it,
    so that a batch never depends on the number of workers. `skipped` maps each broken file met
    by this process to the reason.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        files: Sequence[str],
        shortest_side: int | None = None,
    ):
        self.root = Path(root)
        # One array of bytes: a list of a million strings would be copied into every worker as
        # its reference counts change.
        self._files = np.array([os.fsencode(file) for file in files])
        self._shortest_side = shortest_side
        self.skipped: dict[str, str] = {}
        self._cache: dict[int, Image.Image] = {}
        self._cached_bytes = 0
        self._last: tuple[int, Image.Image] | None = None

    def __getstate__(self) -> dict:
        # Pixels are not worth sending to a worker that is spawned rather than forked.
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0, "_last": None}

    def __len__(self) -> int:
        return len(self._files)

    def path(self, position: int) -> str:
        return str(self.root / os.fsdecode(self._files[position]))

    def read(self, position: int) -> Image.Image:
        """The RGB image at `position`. BrokenImage where it cannot be read."""
        if position in self._cache:
            return self._cache[position]
        # Several crops of one picture are asked for in a row.
        if self._last is not None and self._last[0] == position:
            return self._last[1]
        path = self.path(position)
        if path in self.skipped:
            raise BrokenImage(path, self.skipped[path])
        try:
            image = decode_image(path, self._shortest_side)
        except BrokenImage as error:
            self.skipped[path] = error.reason
            raise
        self._last = (position, image)
        # Pillow keeps four bytes per RGB pixel.
        size = 4 * image.width * image.height
        if self._cached_bytes + size <= _CACHE_BYTES:
            self._cache[position] = image
            self._cached_bytes += size
        return image

    def read_or_next(self, position: int) -> tuple[int, Image.Image]:
        """The first readable image from `position` on, round the end of the list, and where it is.

        Raises:
            NoReadableImage: there is none.
        """
        for step in range(len(self)):
            candidate = (position + step) % len(self)
            try:
                return candidate, self.read(candidate)
            except BrokenImage:
                continue
        reasons = "\n".join(f"  {p}: {r}" for p, r in list(self.skipped.items())[:5])
        raise NoReadableImage(
            f"data must hold at least one readable image; none of the {len(self)} image files in "
            f"{self.root} can be read. The first of them:\n{reasons}"
        )
