"""One image file -> one RGB image, whatever the format and mode."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from typing import IO

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

# Pillow recognises these but cannot decode them without a program or plugin from elsewhere
# (EPS would start Ghostscript on a file of unknown origin).
_NEEDS_HELP = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class BrokenImage(Exception):
    """A file that is no readable image; `path` and `reason` say which one and why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def image_extensions() -> frozenset[str]:
    """Lower-case extensions, with the dot, of every format that this Pillow decodes."""
    Image.init()
    # A phone's multi-picture file is opened by the JPEG plugin.
    formats = {*Image.OPEN, "MPO"} - _NEEDS_HELP
    return frozenset(
        extension.lower()
        for extension, name in Image.registered_extensions().items()
        if name in formats
    )


def decode_image(path: str | os.PathLike[str], shortest_side: int | None = None) -> Image.Image:
    """Read an image file as an upright RGB image of 8 bits per channel.

    Of an animation, the first frame. EXIF orientation is applied. 16-bit grey is scaled by
    255 / 65535; integer and float grey of any other range is stretched to its own minimum and
    maximum. Transparent pixels show white.

    Args:
        path: the file.
        shortest_side: a JPEG may be read at 1/2, 1/4 or 1/8 of its size, which skips most of the
            work, as long as its shorter side keeps this many pixels.

    Raises:
        BrokenImage: the file is missing, truncated, no image, or larger than Pillow's
            decompression-bomb limit (twice `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    # A file object: given a path, Pillow maps an uncompressed file into memory, which jumbles a
    # TIFF that its orientation tag turns by 90 degrees (seen in Pillow 13.0).
    return _decode(lambda: open(path, "rb"), os.fspath(path), shortest_side)


def decode_bytes(content: bytes, name: str, shortest_side: int | None = None) -> Image.Image:
    """`decode_image` of what a file holds; BrokenImage has `name` for its path."""
    return _decode(lambda: io.BytesIO(content), name, shortest_side)


def _decode(opened: Callable[[], IO[bytes]], name: str, shortest_side: int | None) -> Image.Image:
    try:
        with opened() as file, Image.open(file) as image:
            if shortest_side is not None and isinstance(image, JpegImageFile):
                _draft(image, shortest_side)
            image = _to_rgb(ImageOps.exif_transpose(image))
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise BrokenImage(name, f"decompression bomb: {error}") from error
    # Pillow's decoders raise nearly anything on a damaged file: OSError, SyntaxError, ValueError,
    # struct.error, IndexError, zlib.error, ... None of them is worth the run.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise BrokenImage(name, reason) from error


def _draft(image: Image.Image, shortest_side: int) -> None:
    factor = shortest_side / min(image.size)
    if factor < 1:
        # A mode of None keeps the file's own; the scale chosen never falls below the size asked.
        image.draft(None, tuple(math.ceil(side * factor) for side in image.size))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_grey8(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_grey8(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F, which Pillow's own convert() clips at 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode != "F" and low >= 0 and high <= 65535:
        # Mode I holds 16-bit PNG and PGM files as well as 32-bit ones.
        low, high = 0.0, 65535.0
    scaled = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.round(scaled).astype(np.uint8))
