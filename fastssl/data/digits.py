"""The handwritten digits that the wheel of scikit-learn carries: labelled images offline."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fastssl.data.decode import Pixels
from fastssl.data.pictures import Pictures

_FILE = Path("datasets", "data", "digits.csv.gz")


class Digits(Pictures):
    """1797 grey images, 8 x 8, as RGB; `labels` [1797] int64.

    positions: which of them; None: all.

    The package is not imported, and nothing is downloaded. ImportError where it is missing.
    """

    def __init__(self, positions: Sequence[int] | None = None) -> None:
        super().__init__("scikit-learn's digits")
        spec = importlib.util.find_spec("sklearn")
        folder = Path() if spec is None else Path(next(iter(spec.submodule_search_locations)))
        if spec is None or not (folder / _FILE).is_file():
            raise ImportError(
                "data=digits needs the digits of scikit-learn: pip install 'fastssl[photos]'"
            )
        with gzip.open(folder / _FILE, "rt") as file:
            rows = np.loadtxt(file, delimiter=",")
        # Grey values are 0 to 16.
        grey = np.round(rows[:, :-1] * (255 / 16)).astype(np.uint8)
        chosen = slice(None) if positions is None else list(positions)
        self._pixels = grey.reshape(-1, 8, 8)[chosen]
        self.labels = torch.from_numpy(rows[:, -1].astype(np.int64))[chosen]

    def __len__(self) -> int:
        return len(self._pixels)

    def path(self, position: int) -> str:
        return f"digits/{position}"

    def _decode(self, position: int) -> Pixels:
        return self._pixels[position, :, :, None].repeat(3, axis=2)
