"""One image file -> the pixels of one RGB image, whatever the format and mode.

JPEG is decoded by libjpeg-turbo where the package simplejpeg is installed, which spares Pillow's
own copy of the pixels; they are the same. Everything else, and every JPEG that is unusual or
damaged, is Pillow's.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Pixels = np.ndarray  # uint8 [H, W, 3], RGB, C-contiguous; not to be written to

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


def decode_image(path: str | os.PathLike[str], shortest_side: int | None = None) -> Pixels:
    """Read an image file as upright RGB pixels, uint8 [H, W, 3].

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
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null in it
        raise BrokenImage(os.fspath(path), str(error) or type(error).__name__) from error
    return decode_bytes(content, os.fspath(path), shortest_side)


def decode_bytes(content: bytes, name: str, shortest_side: int | None = None) -> Pixels:
    """`decode_image` of what a file holds; BrokenImage has `name` for its path."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            scale = 1
            if shortest_side is not None and isinstance(image, JpegImageFile):
                scale = _scale(image, shortest_side)
            pixels = _decode_jpeg(content, image, scale)
            return _decode_by_pillow(image, scale) if pixels is None else pixels
    except Image.DecompressionBombError as error:
        raise BrokenImage(name, f"decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        # Pillow's words name the object that it read from.
        raise BrokenImage(name, "cannot identify an image in it") from error
    # Pillow's decoders raise nearly anything on a damaged file: OSError, SyntaxError, ValueError,
    # struct.error, IndexError, zlib.error, ... None of them is worth the run.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise BrokenImage(name, reason) from error


def _scale(image: Image.Image, shortest_side: int) -> int:
    """The largest of 1, 2, 4 and 8 by which the shorter side may be divided."""
    factor = shortest_side / min(image.size)
    wanted = (math.ceil(side * factor) for side in image.size)
    room = min(side // want for side, want in zip(image.size, wanted, strict=True))
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(room, 1))


def _decode_jpeg(content: bytes, image: Image.Image, scale: int) -> Pixels | None:
    """By libjpeg-turbo; None for what Pillow should decode, and say what is wrong with."""
    if simplejpeg is None or type(image) is not JpegImageFile or image.mode not in ("RGB", "L"):
        return None
    # Of the scales that keep these sizes it takes the smallest.
    width, height = (-(-side // scale) for side in image.size)
    try:
        pixels = simplejpeg.decode_jpeg(content, "RGB", min_width=width, min_height=height)
    except ValueError:
        return None
    if pixels.shape != (height, width, 3):
        return None
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


# What makes a picture upright, by its EXIF orientation; 1 is upright.
_TURNS = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


def _decode_by_pillow(image: Image.Image, scale: int) -> Pixels:
    if scale > 1:
        # A mode of None keeps the file's own.
        image.draft(None, tuple(side // scale for side in image.size))
    return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


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
