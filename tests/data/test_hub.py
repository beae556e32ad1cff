"""HubImages: datasets of the library `datasets`, by row."""

import numpy as np
import pytest
from PIL import Image

from fastssl.data import build_datasets, hub
from fastssl.data.decode import decode_bytes
from fastssl.data.hub import HubImages, _name_and_split
from tests.data.shards import png

datasets = pytest.importorskip("datasets")


def rows_of(contents, **columns):
    features = {name: datasets.Value("string") for name in columns}
    features = datasets.Features({**features, "image": datasets.Image()})
    return datasets.Dataset.from_dict({**columns, "image": contents}, features=features)


def saved(rows, folder):
    rows.save_to_disk(str(folder))
    return f"hf:{folder}"


def test_rows_with_bytes_with_paths_and_without(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(1))
    contents = [
        {"bytes": png(0), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
        None,
        {"bytes": b"no image", "path": None},
    ]
    # What is saved holds the bytes of files too; only what is loaded otherwise names them.
    monkeypatch.setattr(hub, "_load", lambda data: rows_of(contents, caption=list("abcde")))
    images = HubImages("hf:x")
    assert len(images) == 5
    for i in (0, 1):
        assert np.array_equal(images.read(i), decode_bytes(png(i), ""))
    assert [images.read_or_next(i)[0] for i in (2, 3, 4)] == [0, 0, 0]
    assert list(images.skipped) == [f"hf:x[{i}]" for i in (2, 3, 4)]
    assert images.skipped["hf:x[3]"] == "the row has no image"


def test_pretraining_and_evaluation(tmp_path):
    contents = [{"bytes": png(i), "path": None} for i in range(4)]
    train, (learn, _) = build_datasets(saved(rows_of(contents), tmp_path / "x"), image_size=8)
    assert len(train) == 4 and learn.positions == (0, 1, 2, 3)
    assert f"4 images in hf:{tmp_path}/x" in train.describe()


def test_splits(tmp_path):
    train, test = (rows_of([{"bytes": png(0), "path": None}] * n) for n in (3, 2))
    data = saved(datasets.DatasetDict(train=train, test=test), tmp_path / "both")
    assert len(HubImages(data)) == 3 and len(HubImages(f"{data}/test")) == 2
    data = saved(datasets.DatasetDict(a=train, b=test), tmp_path / "others")
    with pytest.raises(ValueError, match=r"data must name a split of hf:.*others: a, b"):
        HubImages(data)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mnist", ("mnist", "train")),
        ("mnist/test", ("mnist", "test")),
        ("owner/name", ("owner/name", "train")),
        ("owner/name/extra", ("owner/name", "extra")),
    ],
)
def test_names_of_the_hub(name, parts):
    assert _name_and_split(name) == parts


def test_what_cannot_be_used(tmp_path, monkeypatch):
    text = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
    data = saved(text, tmp_path / "text")
    with pytest.raises(ValueError, match=r"data must have a column of type Image; hf:.* has text "):
        HubImages(data)
    with pytest.raises(ValueError, match=r"data must be hf:NAME.*got hf:.*missing"):
        HubImages(f"hf:{tmp_path}/missing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"data must be hf:NAME.*got hf:.*folder"):
        HubImages(f"hf:{tmp_path}/folder")
    monkeypatch.setattr(hub, "_load", lambda data: rows_of([]))
    with pytest.raises(ValueError, match="data must hold at least one image; hf:x has no rows"):
        HubImages("hf:x")


def test_pictures_that_datasets_encoded(tmp_path):
    images = HubImages(saved(rows_of([Image.new("RGB", (9, 7), (10, 20, 30))]), tmp_path / "x"))
    assert images.read(0).shape == (7, 9, 3) and images.read(0)[3, 3].tolist() == [10, 20, 30]
