"""The photographs that the wheels of scikit-image and scikit-learn carry: real images offline.

What is drawn, computed (the cell is a phase retrieved from a hologram) or nearly empty is left out,
and so is one of the two motorcycles (a stereo pair shows the same scene twice).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

_SKIMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png"),
    *("coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png"),
)
_SKLEARN = ("china.jpg", "flower.jpg")
_INSTALL = "pip install 'fastssl[photos]'"


def list_photos() -> tuple[Path, list[str]]:
    """The folder both packages are in, and the photographs relative to it.

    Neither package is imported, and nothing is downloaded.

    Raises:
        ImportError: a package or one of its photographs is missing; says what to install.
    """
    skimage = _folder("skimage", "scikit-image") / "data"
    sklearn = _folder("sklearn", "scikit-learn") / "datasets" / "images"
    paths = [skimage / name for name in _SKIMAGE] + [sklearn / name for name in _SKLEARN]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ImportError(
            f"data=photos needs files that are not there: {', '.join(missing)}. They come with "
            f"the packages: {_INSTALL}"
        )
    root = Path(os.path.commonpath(paths))
    return root, [str(path.relative_to(root)) for path in paths]


def _folder(module: str, package: str) -> Path:
    # find_spec of a top-level name looks for the package without running it.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"data=photos needs the pictures of {package}: {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))
