"""Labelled images: which files, which labels, what is held out, and the centre crop."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data.crops import Request
from fastssl.data.folder import ImageFiles
from fastssl.data.labelled import CenterCrop, LabelledImages, build_labelled, rank_requests
from fastssl.data.loader import Loader
from fastssl.data.transforms import denormalize
from fastssl.data.views import View


def save(file: Path, color=0, size=(12, 9)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, color, color)).save(file)


def everything(dataset):
    return dataset[Request(torch.arange(len(dataset)))]


def names(dataset):
    return [Path(dataset.path(i)).name for i in range(len(dataset))]


@pytest.mark.parametrize(
    "size, image, resized, corner",
    [
        ((224, 224), (500, 375), (341, 256), (58, 16)),
        ((224, 224), (375, 500), (256, 341), (16, 58)),
        ((14, 14), (16, 16), (16, 16), (1, 1)),
        ((7, 28), (64, 64), (32, 32), (2, 12)),  # a wide crop of a square: the width decides
        ((8, 8), (1, 90), (9, 810), (0, 401)),
    ],
)
def test_centre_crop(size, image, resized, corner):
    pixels = np.random.default_rng(0).integers(0, 256, (*image[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    left, top = corner
    box = (left, top, left + size[1], top + size[0])
    expected = np.array(picture.resize(resized, Image.Resampling.BICUBIC).crop(box))
    got = CenterCrop(size)(pixels)
    assert got.shape == (3, *size)
    difference = np.abs(got.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_a_centre_crop_resizes_the_centre_alone(monkeypatch):
    resize, sizes = Image.Image.resize, []

    def watched(image, size, *args, **kwargs):
        sizes.append(size)
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    narrow = np.broadcast_to(np.array([10, 20, 30], np.uint8), (6000, 2, 3))
    got = CenterCrop((16, 16))(narrow)
    assert got[:, 3, 5].tolist() == [10, 20, 30]
    assert max(map(max, sizes)) <= 16, "not 18 x 54000"


def test_train_and_val_folders(tmp_path):
    for name in ("train/b/1.png", "train/a/deep/er/2.png", "train/c/3.png", "val/c/4.png"):
        save(tmp_path / name)
    save(tmp_path / "test/a/5.png")  # val comes first
    save(tmp_path / "val/6.png")
    train, test = build_labelled(tmp_path, image_size=8)
    assert train.classes == test.classes == ("a", "b", "c")
    assert (names(train), train.labels.tolist()) == (["2.png", "1.png", "3.png"], [0, 1, 2])
    assert (names(test), test.labels.tolist()) == (["4.png"], [2])
    assert everything(test).skipped == {str(tmp_path / "val/6.png"): "lies in no folder of a class"}


@pytest.mark.parametrize("judged", ["valid", "validation", "test"])
def test_other_names_in_place_of_val(tmp_path, judged):
    for name in ("train/a/1.png", "train/b/2.png", f"{judged}/b/3.png"):
        save(tmp_path / name)
    train, test = build_labelled(tmp_path, image_size=8)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1], [1])


def test_train_may_be_a_class(tmp_path):
    for name in ("train/red/1.png", "train/2.png", "train/3.png", "car/blue/4.png", "car/5.png"):
        save(tmp_path / name)
    assert build_labelled(tmp_path, image_size=8)[0].classes == ("car", "train")


@pytest.mark.parametrize("top", ["", "train"])
def test_a_fifth_of_each_class_is_held_out(tmp_path, top):
    numbers = {"a": 20, "b": 11, "c": 2, "d": 1}
    for name, number in numbers.items():
        for i in range(number):
            save(tmp_path / top / name / f"{name}{i}.png")
    train, test = build_labelled(tmp_path, image_size=8)
    assert test.labels.bincount(minlength=4).tolist() == [4, 2, 1, 0]
    assert sorted(names(train) + names(test)) == sorted(
        f"{name}{i}.png" for name, number in numbers.items() for i in range(number)
    )
    for dataset in (train, test):
        assert [name[0] for name in names(dataset)] == [
            dataset.classes[label] for label in dataset.labels
        ]
        assert torch.equal(everything(dataset).labels, dataset.labels)
    assert names(build_labelled(tmp_path, image_size=8)[1]) == names(test)
    assert names(build_labelled(tmp_path, image_size=8, seed=1)[1]) != names(test)


def test_a_broken_file_is_left_out_and_reported(tmp_path):
    for i in range(4):
        save(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", 50 * i)
        save(tmp_path / "val" / "ab"[i % 2] / f"{i}.png", 50 * i)
    broken = tmp_path / "val" / "a" / "2.png"
    broken.write_bytes(b"not a picture")
    _, test = build_labelled(tmp_path, image_size=8)
    batch = everything(test)  # in the order 0, 2, 1, 3
    assert batch.index.tolist() == [0, 2, 3]
    assert batch.labels.tolist() == [0, 1, 1]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 50, 150]
    assert list(batch.skipped) == [str(broken)]
    alone = test[Request(torch.tensor([1]))]
    assert len(alone) == 0 and alone.images.shape == (0, 3, 8, 8) and alone.skipped is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_through_the_loader(tmp_path, num_workers):
    for i in range(10):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", 20 * i)
    (tmp_path / "a" / "0.png").write_bytes(b"")
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    train, _ = build_labelled(tmp_path, image_size=8, mean=mean, std=std)
    loader = Loader(train, rank_requests(len(train), 3), num_workers=num_workers)
    batches = list(loader)
    colors = torch.cat([denormalize(b.images, mean, std)[:, 1, 4, 4] for b in batches])
    index = torch.cat([batch.index for batch in batches]).tolist()
    assert colors.tolist() == [20 * int(Path(train.path(i)).stem) for i in index]
    assert torch.cat([b.labels for b in batches]).tolist() == train.labels[index].tolist()
    unreadable = [p for p in map(train.path, range(len(train))) if p.endswith("/0.png")]
    assert len(index) + len(unreadable) == len(train) and [*loader.skipped] == unreadable


def test_other_views_of_the_same_samples():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)

    class Pictures:
        def __init__(self):
            self.skipped = {}

        def __len__(self):
            return len(pixels)

        def read(self, position):
            return pixels[position]

    labels = torch.tensor([0, 1, 0])
    plain = LabelledImages(
        Pictures(), CenterCrop((8, 8)), positions=torch.tensor([1, 3, 5]), labels=labels
    )
    views = plain.seen_through([View((8, 8), number=1), View((6, 6), grey=1.0)], seed=3)
    batch = everything(views)
    assert [view.shape for view in batch.views] == [(3, 3, 8, 8), (3, 3, 6, 6)]
    assert torch.equal(batch.labels, labels)
    assert torch.equal(batch.views[1][:, 0], batch.views[1][:, 2])
    # A function of seed, epoch and sample.
    last = views[Request(torch.tensor([2]))]
    assert torch.equal(last.images[0], batch.images[2])
    epoch = views[Request(torch.tensor([2]), epoch=1)]
    assert not torch.equal(last.images, epoch.images)
    other = plain.seen_through(views.views, seed=4)[Request(torch.tensor([2]))]
    assert not torch.equal(last.images, other.images)


@pytest.mark.parametrize(
    "files, message",
    [
        (["a/1.png"], "at least two classes"),
        (["1.png", "2.png"], "at least two classes.* has 0"),
        (["a/1.png", "b/1.png"], "at least two images, of which to hold one out"),
        (["train/a/1.png", "train/b/1.png", "val/c/1.png"], "classes of val in train too.*c there"),
        (["train/a/1.png", "train/b/1.png", "dev/b/1.png"], "or test beside train.* in dev"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, files, message):
    for file in files:
        save(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        build_labelled(tmp_path, image_size=8)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train, test = build_labelled("digits", image_size=7)
    assert (len(train), len(test)) == (1438, 359)
    assert train.classes == tuple("0123456789")
    both = torch.cat([train.positions, test.positions])
    assert torch.equal(both.sort().values, torch.arange(1797))
    for dataset in (train, test):
        assert np.array_equal(dataset.labels, bunch.target[dataset.positions])
    # 8 pixels make 7 without being resized.
    images = everything(test).images
    expected = np.round(bunch.images[test.positions][:, :7, :7] * 255 / 16)
    for channel in range(3):
        assert np.array_equal(images[:, channel], expected)


def test_scikit_learn_is_not_imported_and_missed_in_words(monkeypatch):
    code = (
        "import sys; from fastssl.data.labelled import build_labelled; "
        "build_labelled('digits', image_size=8); print({'sklearn', 'scipy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fastssl\[photos\]'"):
        build_labelled("digits", image_size=8)


@pytest.mark.parametrize("num, batch, world", [(10, 3, 1), (10, 3, 2), (10, 3, 5), (0, 3, 2)])
def test_ranks_share_whole_batches(num, batch, world):
    whole = [r.indices.tolist() for r in rank_requests(num, batch)]
    shared = [
        r.indices.tolist() for rank in range(world) for r in rank_requests(num, batch, rank, world)
    ]
    assert shared == whole
    assert [i for part in whole for i in part] == list(range(num))


def test_without_labels(tmp_path):
    save(tmp_path / "1.png")
    dataset = LabelledImages(ImageFiles(tmp_path, ["1.png"]), CenterCrop((4, 4)))
    assert everything(dataset).labels is None


def test_no_such_folder(tmp_path):
    message = r"'digits' or a folder of class folders; .* does not exist"
    with pytest.raises(ValueError, match=message):
        build_labelled(tmp_path / "no", image_size=8)
