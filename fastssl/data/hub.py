"""Pictures of a dataset of the library `datasets`, from its hub or from `save_to_disk`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastssl.data.decode import BrokenImage, Pixels, decode_bytes, decode_image
from fastssl.data.pictures import Pictures

PREFIX = "hf:"
_SPLITS = ("train", "validation", "valid", "val", "test")


class HubImages(Pictures):
    """The first column of images of a dataset, row by row, memory-mapped by `datasets`.

    data: hf:NAME, hf:NAME/SPLIT or hf:/folder of `save_to_disk`. The last of two parts is a split
        if it is called train, validation, valid, val or test, the last of three always is; else
        the split is train. A name is downloaded whole, by `datasets` into its own cache.

    Raises:
        ValueError: no such dataset or split, or no column of images.
        ImportError: `datasets` is not installed.
    """

    def __init__(self, data: str, shortest_side: int | None = None):
        super().__init__(data, shortest_side)
        rows = _load(data)
        self._column = _image_column(data, rows)
        # Bytes: `datasets` would decode on its own, and raise on what is broken.
        kind = type(rows.features[self._column])(decode=False)
        self._rows = rows.select_columns(self._column).cast_column(self._column, kind)
        if not len(self._rows):
            raise ValueError(f"data must hold at least one image; {data} has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, position: int) -> str:
        return f"{self.root}[{position}]"

    def _decode(self, position: int) -> Pixels:
        name = self.path(position)
        stored = self._rows[position][self._column]
        if not stored or (stored["bytes"] is None and stored["path"] is None):
            raise BrokenImage(name, "the row has no image")
        if stored["bytes"] is not None:
            return decode_bytes(stored["bytes"], name, self._shortest_side)
        try:
            return decode_image(stored["path"], self._shortest_side)
        except BrokenImage as error:
            raise BrokenImage(name, error.reason) from error


def _load(data: str) -> Any:  # -> datasets.Dataset
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"data={data} needs datasets: pip install 'fastssl[hf]'") from error

    name, split = data.removeprefix(PREFIX), None
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            loaded = datasets.load_from_disk(str(folder))
        elif name.startswith(("/", "~", ".")):
            raise FileNotFoundError(f"{folder} is no folder")
        else:
            name, split = _name_and_split(name)
            return datasets.load_dataset(name, split=split)
    except Exception as error:  # what is wrong comes from a server, a file, or the dataset's code
        raise ValueError(
            f"data must be hf:NAME, hf:NAME/SPLIT or hf:/folder of save_to_disk, got {data}: "
            f"{error}"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if "train" not in loaded:
        raise ValueError(f"data must name a split of {data}: {', '.join(loaded)}")
    return loaded["train"]


def _name_and_split(name: str) -> tuple[str, str]:
    parts = name.split("/")
    if len(parts) == 3 or (len(parts) == 2 and parts[1] in _SPLITS):
        return "/".join(parts[:-1]), parts[-1]
    return name, "train"


def _image_column(data: str, rows: Any) -> str:
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            return name
    columns = ", ".join(f"{name} ({type(f).__name__})" for name, f in rows.features.items())
    raise ValueError(f"data must have a column of type Image; {data} has {columns}")
