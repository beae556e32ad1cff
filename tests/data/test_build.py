"""build_datasets: halves that never meet, and the same scheme for photographs and folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data import build_datasets, build_loader
from fastssl.data.crops import Request, left_half, right_half
from fastssl.data.digits import Digits
from fastssl.data.labelled import build_labelled
from fastssl.data.views import View


def everything(dataset):
    return dataset[Request(torch.arange(len(dataset)))]


def coded_folder(root, number=3, width=40):
    """Pictures whose pixels tell picture (red, tens), left or right half (green)."""
    for i in range(number):
        pixels = np.zeros((30, width, 3), np.uint8)
        pixels[:, :, 0] = 10 * (i + 1)
        pixels[:, width // 2 :, 1] = 200
        Image.fromarray(pixels).save(root / f"{i}.png")
    return str(root)


@pytest.mark.parametrize("size", [(1, 9), (2, 9), (7, 4), (8, 4), (1411, 3)])
def test_halves_are_disjoint_and_make_up_the_picture(size):
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    left, right = left_half(picture), right_half(picture)
    covered = np.zeros((size[1], size[0]), int)
    for x0, y0, x1, y1 in (left, right):
        assert x1 > x0 and y1 > y0
        covered[y0:y1, x0:x1] += 1
    assert (covered == 1).all() or size[0] == 1


def test_train_and_test_crops_come_from_disjoint_halves(tmp_path):
    train, evaluation = build_datasets(coded_folder(tmp_path), image_size=8, eval_crops=16)
    learn, test = map(everything, evaluation)
    assert learn.images.shape == (48, 3, 8, 8) and learn.images.dtype == torch.uint8
    assert torch.equal(learn.labels, torch.arange(3).repeat_interleave(16))
    assert torch.equal(learn.labels, test.labels)
    for batch, green in ((learn, 0), (test, 200)):
        assert (batch.images[:, 1] == green).all()
        red = batch.images[:, 0].long()
        assert torch.equal(red, (10 * (batch.labels + 1)).view(-1, 1, 1).expand_as(red))
    pretraining = train[Request(torch.arange(300))]
    assert (pretraining.images[:, 1] == 0).all() and pretraining.labels is None


def test_photographs():
    train, (learn, test) = build_datasets("photos", image_size=32, eval_crops=4)
    assert len(train.files) == 18 and train.held_out == set(range(18))
    assert len(train) == 18 * 64 and len(learn) == len(test) == 18 * 4
    assert "18 images" in train.describe()
    batch = everything(test)
    assert batch.images.shape == (18 * 4, 3, 32, 32)
    assert batch.images.float().flatten(1).std(dim=1).median() > 10, "photographs, not blanks"


def test_evaluation_is_fixed_while_crops_follow_the_seed(tmp_path):
    folder = coded_folder(tmp_path)
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (150, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (a, (learn_a, test_a)), (b, (learn_b, test_b)) = (
        build_datasets(folder, image_size=8, seed=seed) for seed in (0, 1)
    )
    for x, y in ((learn_a, learn_b), (test_a, test_b)):
        assert torch.equal(everything(x).images, everything(y).images)
    # Each crop is one of its own.
    assert len(everything(learn_a).images.unique(dim=0)) == len(learn_a)
    assert not torch.equal(everything(a).images, everything(b).images)


def test_evaluated_images_are_capped_and_the_rest_is_whole(tmp_path):
    folder = coded_folder(tmp_path, number=10)
    train, (learn, _) = build_datasets(folder, image_size=8, max_eval_images=4, eval_crops=2)
    assert train.held_out == {0, 2, 5, 7} and learn.positions == (0, 2, 5, 7)
    batch = train[Request(torch.arange(400))]
    right = (batch.images[:, 1] > 0).flatten(1).any(dim=1)
    picture = batch.index % 10
    assert sorted(set(picture[right].tolist())) == [1, 3, 4, 6, 8, 9]


def test_broken_files_take_no_part_in_evaluation(tmp_path):
    folder = coded_folder(tmp_path, number=4)
    (tmp_path / "1.png").write_text("no image")
    train, (learn, test) = build_datasets(folder, image_size=8, eval_crops=2)
    assert learn.positions == (0, 2, 3)
    assert everything(test).labels.tolist() == [0, 0, 1, 1, 2, 2]
    loader = build_loader(train, global_batch_size=4, num_steps=1)
    list(loader)
    assert list(loader.skipped) == [str(tmp_path / "1.png")]


def test_subfolders_are_no_labels(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        coded_folder(tmp_path / name, number=2)
    _, (learn, _) = build_datasets(str(tmp_path), image_size=8, eval_crops=1)
    assert everything(learn).labels.tolist() == [0, 1, 2, 3]


def test_a_single_picture_has_no_evaluation(tmp_path):
    train, evaluation = build_datasets(coded_folder(tmp_path, number=1), image_size=8)
    assert evaluation is None and train.held_out == set()
    (tmp_path / "x.png").write_text("no image")
    assert build_datasets(str(tmp_path), image_size=8)[1] is None


def test_no_evaluation_on_request(tmp_path):
    train, evaluation = build_datasets(coded_folder(tmp_path), image_size=8, max_eval_images=0)
    assert evaluation is None and train.held_out == set()


def test_height_and_width(tmp_path):
    train, _ = build_datasets(coded_folder(tmp_path), image_size=(8, 16))
    assert train[Request(torch.arange(2))].images.shape == (2, 3, 8, 16)


def test_jpegs_are_read_no_larger_than_needed(tmp_path):
    for i in range(2):
        Image.new("RGB", (1600, 1200)).save(tmp_path / f"{i}.jpg")
    train, _ = build_datasets(
        str(tmp_path), image_size=32, views=[View((32, 32), (0.25, 1.0))], eval_scale=(0.25, 1)
    )
    # 2 x 32 / sqrt(0.25) = 128 pixels are needed; an eighth of the file has 150.
    assert train.files.read(0).shape == (150, 200, 3)


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="data must hold at least one readable image"):
        build_datasets(str(tmp_path), image_size=8)
    with pytest.raises(ValueError, match="does not exist"):
        build_datasets(str(tmp_path / "missing"), image_size=8)


def test_with_a_region_a_sample_is_a_part_of_its_picture(tmp_path):
    """The same part in every epoch and view; another for another sample of the picture."""
    columns = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    rows = np.tile(np.arange(100, dtype=np.uint8)[:, None], (1, 200))
    Image.fromarray(np.stack([columns, rows, rows], axis=2)).save(tmp_path / "0.png")
    views = [View((8, 8), (0.9, 1.0), flip=0.0, number=2)]
    train, _ = build_datasets(str(tmp_path), image_size=8, views=views, region=(0.05, 0.1))
    means = []
    for epoch in (0, 1):
        batch = train[Request(torch.arange(16), epoch)]
        means += [view.float().mean(dim=(2, 3)) for view in batch.views]
    means = torch.stack(means)[:, :, :2]  # [draws, samples, (x, y)]
    within = means.std(dim=0).mean()
    between = means.mean(dim=0).std(dim=0).mean()
    assert within < 3.0 and between > 15.0
    assert (means[0] != means[1]).any() and (means[0] != means[2]).any()


def test_digits_are_pretrained_on_without_those_that_are_held_out():
    train, evaluation = build_datasets("digits", image_size=16, seed=3)
    _, test = build_labelled("digits", image_size=16, seed=3)
    assert evaluation is None and len(train) + len(test) == 1797
    everything = Digits()
    held_out = {everything.read(i).tobytes() for i in test.positions.tolist()}
    seen = [train.files.read_or_next(i)[1].tobytes() for i in range(len(train))]
    # Some digits are there twice.
    assert sum(image in held_out for image in seen) < 10
    batch = train[Request(torch.arange(5))]
    assert batch.images.shape == (5, 3, 16, 16)
    assert "scikit-learn's digits" in train.describe()
