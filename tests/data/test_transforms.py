"""Random resized crops and normalisation, as numbers."""

import math

import numpy as np
import pytest
import torch

from fastssl.data.transforms import RandomResizedCrop, denormalize, normalize

REGION = (100, 50, 500, 350)  # 400 x 300


def test_box_has_the_area_and_ratio_asked_for():
    crop = RandomResizedCrop((64, 64), scale=(0.2, 0.6), ratio=(0.5, 2.0))
    for area_u, ratio_u in [(0.0, 0.5), (0.5, 0.25), (1.0, 0.5), (0.3, 0.9)]:
        left, top, right, bottom = crop.box(REGION, (area_u, ratio_u, 0.5, 0.5, 0.0))
        width, height = right - left, bottom - top
        area = 400 * 300 * (0.2 + area_u * 0.4)
        assert width * height == pytest.approx(area, rel=0.01)
        assert width / height == pytest.approx(0.5 * 4**ratio_u, rel=0.01)


def test_box_positions_reach_both_ends():
    crop = RandomResizedCrop((64, 64), scale=(0.25, 0.25), ratio=(1.0, 1.0))
    side = round(math.sqrt(0.25 * 400 * 300))
    almost_one = 1 - 2**-24
    assert crop.box(REGION, (0, 0, 0, 0, 0)) == (100, 50, 100 + side, 50 + side)
    last = (500 - side, 350 - side, 500, 350)
    assert crop.box(REGION, (0, 0, almost_one, almost_one, 0)) == last


def test_boxes_stay_inside_and_cover_the_region_evenly():
    crop = RandomResizedCrop((8, 8), scale=(0.01, 1.0), ratio=(0.1, 10.0))
    numbers = np.random.default_rng(0).random((4000, 5)).tolist()
    boxes = np.array([crop.box(REGION, u) for u in numbers])
    assert (boxes[:, :2] >= REGION[:2]).all() and (boxes[:, 2:] <= REGION[2:]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    np.testing.assert_allclose(centres.mean(axis=0), (300, 200), atol=3)


def test_one_pixel_region():
    crop = RandomResizedCrop((4, 4), scale=(0.01, 0.02))
    assert crop.box((3, 5, 4, 6), (0, 0, 0.99, 0.99, 0)) == (3, 5, 4, 6)


def test_the_whole_picture_at_its_size_is_the_picture():
    values = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    region = (0, 0, 10, 6)
    crop = RandomResizedCrop((6, 10), scale=(1.0, 1.0), ratio=(10 / 6, 10 / 6), flip=0.5)
    out = crop(values, region, (0.0, 0.0, 0.0, 0.0, 0.5))
    assert out.dtype == torch.uint8
    np.testing.assert_array_equal(out.permute(1, 2, 0).numpy(), values)
    mirrored = crop(values, region, (0.0, 0.0, 0.0, 0.0, 0.49))
    np.testing.assert_array_equal(mirrored.permute(1, 2, 0).numpy(), values[:, ::-1])


def test_resize_is_antialiased():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    crop = RandomResizedCrop((16, 16), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    out = crop(stripes, (0, 0, 128, 128), (0.0,) * 5).float()
    # Without antialiasing every pixel of the result would be black or white.
    torch.testing.assert_close(out[:, :, 2:-2], torch.full((3, 16, 12), 127.5), atol=2, rtol=0)


def test_pixels_outside_of_the_region_do_not_leak():
    values = np.full((64, 128, 3), 255, np.uint8)
    values[:, :64] = 10
    crop = RandomResizedCrop((16, 16), scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    left = crop(values, (0, 0, 64, 64), (0.0,) * 5)
    assert (left == 10).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", (0, 4)),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.5)),
        ("ratio", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
        ("flip", 1.5),
    ],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        RandomResizedCrop(**{"size": (4, 4), name: value})


def test_normalize():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.3, 0.4)
    out = normalize(images, mean, std)
    assert out.dtype == torch.float32 and out.is_contiguous()
    for c in range(3):
        expected = (images[:, c].double() / 255 - mean[c]) / std[c]
        torch.testing.assert_close(out[:, c].double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(denormalize(out, mean, std), images)


def test_denormalize_clips():
    out = denormalize(torch.tensor([-9.0, 9.0]).reshape(2, 1, 1, 1), (0.5,), (0.2,))
    assert out.flatten().tolist() == [0, 255]
