"""Colour operations against the same formulas for one picture at a time, in float64."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from fastssl.data import color

LUMA = np.array([0.2989, 0.587, 0.114])
ADJUSTMENTS = [
    color.adjust_brightness,
    color.adjust_contrast,
    color.adjust_saturation,
    color.adjust_hue,
]


def grey_of(picture):  # [3, H, W] -> [1, H, W]
    return np.tensordot(LUMA, picture, axes=1)[None]


def brightness(picture, factor):
    return np.clip(factor * picture, 0, 1)


def contrast(picture, factor):
    return np.clip(factor * picture + (1 - factor) * grey_of(picture).mean(), 0, 1)


def saturation(picture, factor):
    return np.clip(factor * picture + (1 - factor) * grey_of(picture), 0, 1)


def hue(picture, shift):
    out = np.empty_like(picture)
    for y, x in np.ndindex(picture.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*picture[:, y, x])
        out[:, y, x] = colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
    return out


EXPECTED = [brightness, contrast, saturation, hue]


def blur(picture, sigma, kernel_size):
    """Convolution with a dense two-dimensional kernel."""
    radius = kernel_size // 2
    pdf = np.exp(-0.5 * (np.linspace(-radius, radius, kernel_size) / sigma) ** 2)
    kernel = np.outer(pdf, pdf) / pdf.sum() ** 2
    padded = np.pad(picture, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (kernel_size, kernel_size), axis=(1, 2)
    )
    return np.einsum("chwij,ij->chw", windows, kernel)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    """Random colours, among them greys, black, white and ties between two channels."""
    out = np.random.default_rng(seed).random((shape[0], 3, *shape[1:]))
    flat = out.reshape(shape[0], 3, -1)
    if flat.shape[2] > 6:
        flat[:, :, 0] = flat[:, :1, 0]
        flat[:, :, 1], flat[:, :, 2] = 0, 1
        for i, (one, other) in enumerate([(0, 1), (1, 2), (0, 2)]):
            flat[:, one, 3 + i] = flat[:, other, 3 + i]
    return torch.from_numpy(out).float()


def numbers(n: int, low: float, high: float, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, n)).float()


def assert_rows(out: Tensor, images: Tensor, expected, *parameters: Tensor, atol=2e-6):
    assert out.shape == images.shape and out.dtype == images.dtype
    rows = [
        expected(one.double().numpy(), *(p[i].item() for p in parameters))
        for i, one in enumerate(images)
    ]
    np.testing.assert_allclose(out.double().numpy(), np.stack(rows), atol=atol, rtol=0)


def as_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


@pytest.mark.parametrize("shape", [(6, 9, 11), (3, 1, 1), (2, 1, 8)])
@pytest.mark.parametrize("which", range(4))
def test_adjustments_are_the_formulas(which, shape):
    images = pictures(*shape)
    low, high = (-0.5, 0.5) if which == 3 else (0.0, 2.5)
    parameter = numbers(shape[0], low, high)
    assert_rows(ADJUSTMENTS[which](images, parameter), images, EXPECTED[which], parameter)


def test_adjustments_of_float64_are_exact():
    images = pictures(4, 8, 8).double()
    for which in range(4):
        parameter = numbers(4, 0.1, 0.5).double()
        out = ADJUSTMENTS[which](images, parameter)
        assert_rows(out, images, EXPECTED[which], parameter, atol=1e-12)


def test_adjustments_that_change_nothing():
    images = pictures(3, 8, 8)
    for adjust in ADJUSTMENTS[:3]:
        assert torch.equal(adjust(images, torch.ones(3)), images)
    for turns in (0.0, 1.0, -1.0):
        out = color.adjust_hue(images, torch.full((3,), turns))
        torch.testing.assert_close(out, images, atol=1e-6, rtol=0)


def test_a_third_of_a_turn_permutes_the_channels():
    images = pictures(2, 8, 8)
    out = color.adjust_hue(images, torch.tensor([1 / 3, -1 / 3]))
    torch.testing.assert_close(out[0], images[0].roll(1, dims=0), atol=2e-6, rtol=0)
    torch.testing.assert_close(out[1], images[1].roll(-1, dims=0), atol=2e-6, rtol=0)


def test_pillow_agrees_within_two_levels():
    images = (pictures(8, 24, 20) * 255).round() / 255
    factors = numbers(8, 0.2, 1.8)
    for adjust, enhancer in [
        (color.adjust_brightness, ImageEnhance.Brightness),
        (color.adjust_contrast, ImageEnhance.Contrast),
        (color.adjust_saturation, ImageEnhance.Color),
    ]:
        out = adjust(images, factors)
        for i in range(8):
            theirs = from_pil(enhancer(as_pil(images[i])).enhance(factors[i].item()))
            torch.testing.assert_close(out[i], theirs, atol=2 / 255, rtol=0)
    for i in range(8):
        grey = from_pil(as_pil(images[i]).convert("L"))
        torch.testing.assert_close(color.to_grey(images)[i], grey, atol=2 / 255, rtol=0)
        inverted = from_pil(ImageOps.solarize(as_pil(images[i]), 128))
        torch.testing.assert_close(color.solarize(images)[i], inverted, atol=1e-6, rtol=0)


def test_grey():
    images = pictures(3, 5, 7)
    out = color.to_grey(images)
    assert_rows(out, images, lambda one: np.repeat(grey_of(one), 3, axis=0))
    out[:, 0] = 0
    assert (out[:, 1] > 0).any(), "the channels must not share memory"


@pytest.mark.parametrize(
    ("height", "width", "kernel_size"),
    [(13, 17, 5), (24, 12, 23), (7, 30, 1), (1, 1, 3), (1, 6, 5), (2, 3, 9)],
)
def test_blur_is_a_dense_convolution(height, width, kernel_size):
    images = pictures(5, height, width)
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0, 30.0])
    out = color.gaussian_blur(images, sigma, kernel_size)
    assert_rows(out, images, lambda one, s: blur(one, s, kernel_size), sigma)


def test_blur_keeps_what_is_constant_and_spreads_a_point():
    constant = torch.full((2, 3, 9, 9), 0.7)
    sigma = torch.tensor([0.3, 2.0])
    torch.testing.assert_close(color.gaussian_blur(constant, sigma, 5), constant)
    point = torch.zeros(2, 3, 9, 9)
    point[:, 1, 4, 4] = 1
    out = color.gaussian_blur(point, sigma, 5)
    assert (out[:, [0, 2]] == 0).all() and out[0, 1, 4, 4] > 5 * out[1, 1, 4, 4]
    torch.testing.assert_close(out[:, 1].sum(dim=(1, 2)), torch.ones(2))
    torch.testing.assert_close(out, out.transpose(2, 3))


def test_solarize():
    values = torch.tensor([0.0, 0.25, 0.49, 0.5, 0.75, 1.0])
    images = values.expand(1, 3, 1, 6)
    out = color.solarize(images)[0, 0, 0]
    torch.testing.assert_close(out, torch.tensor([0.0, 0.25, 0.49, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(color.solarize(images, 0.0), 1 - images)


def test_jitter_of_200_random_draws():
    images = pictures(200, 4, 5)
    rng = np.random.default_rng(3)
    factors = np.concatenate(
        [rng.uniform(0.2, 1.8, (200, 3)), rng.uniform(-0.5, 0.5, (200, 1))], axis=1
    )
    order = rng.permuted(np.tile(np.arange(4), (200, 1)), axis=1)
    assert len(np.unique(order, axis=0)) == 24
    out = color.color_jitter(images, torch.from_numpy(factors).float(), torch.from_numpy(order))
    worst = 0.0
    for i in range(200):
        expected = images[i].double().numpy()
        for which in order[i]:
            expected = EXPECTED[which](expected, factors[i, which])
        worst = max(worst, np.abs(out[i].double().numpy() - expected).max())
    assert worst < 1e-4


def test_jitter_order_matters():
    images = pictures(1, 6, 6).expand(24, -1, -1, -1)
    factors = torch.tensor([1.6, 0.5, 1.7, 0.2]).expand(24, -1)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    out = color.color_jitter(images, factors, orders)
    by_hand = images[:1]
    for which in (2, 0, 3, 1):
        by_hand = ADJUSTMENTS[which](by_hand, factors[:1, which])
    row = orders.tolist().index([2, 0, 3, 1])
    assert torch.equal(out[row], by_hand[0])
    # Brightness first clips what brightness last does not.
    first, last = orders.tolist().index([0, 1, 2, 3]), orders.tolist().index([1, 2, 3, 0])
    assert (out[first] - out[last]).abs().max() > 0.1


def every_op(images: Tensor, numbers_of_rows: Tensor):
    """All the operations, with parameters out of [B, 4] of [0, 1)."""
    for i, adjust in enumerate(ADJUSTMENTS):
        yield adjust(images, numbers_of_rows[:, i])
    yield color.color_jitter(images, numbers_of_rows, numbers_of_rows.argsort(dim=1))
    yield color.gaussian_blur(images, numbers_of_rows[:, 0] + 0.1, 7)
    yield color.to_grey(images)
    yield color.solarize(images)


@pytest.mark.parametrize("side", [5, 32])
def test_a_row_does_not_depend_on_its_neighbours(side):
    images = pictures(9, side, side + 2)
    parameters = torch.from_numpy(np.random.default_rng(2).random((9, 4))).float()
    whole = list(every_op(images, parameters))
    alone = [list(every_op(images[i : i + 1], parameters[i : i + 1])) for i in range(9)]
    for op, together in enumerate(whole):
        for i in range(9):
            assert torch.equal(together[i], alone[i][op][0])


def test_memory_formats_and_arguments_stay_as_they_are():
    images = pictures(4, 8, 6)
    parameters = torch.from_numpy(np.random.default_rng(2).random((4, 4))).float()
    kept = images.clone(), parameters.clone()
    plain = list(every_op(images, parameters))
    assert torch.equal(images, kept[0]) and torch.equal(parameters, kept[1])
    last = images.contiguous(memory_format=torch.channels_last)
    for one, other in zip(plain, every_op(last, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_results_stay_in_range():
    images = pictures(64, 6, 6)
    parameters = torch.from_numpy(np.random.default_rng(2).random((64, 4))).float() * 3
    for out in every_op(images, parameters):
        assert out.min() >= 0 and out.max() <= 1 + 1e-6


def test_empty_batch():
    for out in every_op(torch.zeros(0, 3, 4, 4), torch.zeros(0, 4)):
        assert out.shape == (0, 3, 4, 4)


def test_apply_to_rows_touches_the_chosen_only():
    images = pictures(4, 2, 2)
    expected = images.clone()
    chosen = torch.tensor([False, True, False, True])
    color.apply_to_rows(images, chosen, lambda x, f: x * f[:, None, None, None], torch.arange(4))
    expected[1], expected[3] = expected[1] * 1, expected[3] * 3
    assert torch.equal(images, expected)

    def refuse(rows):
        raise AssertionError("nothing was chosen")

    color.apply_to_rows(images, torch.zeros(4, dtype=torch.bool), refuse)


def test_wrong_arguments_are_named():
    images, ones = torch.rand(2, 3, 4, 4), torch.ones(2)
    with pytest.raises(TypeError, match=r"^images must be float32"):
        color.to_grey(images.byte())
    with pytest.raises(ValueError, match=r"^images must have shape \[B, 3, H, W\]"):
        color.solarize(images[:, :1])
    for adjust in ADJUSTMENTS:
        name = "shift" if adjust is color.adjust_hue else "factor"
        with pytest.raises(ValueError, match=rf"^{name} must have shape \[B\] = \[2\], got \[3\]"):
            adjust(images, torch.ones(3))
        with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got float"):
            adjust(images, 1.0)
    with pytest.raises(ValueError, match=r"^sigma must have shape"):
        color.gaussian_blur(images, torch.ones(2, 1), 3)
    with pytest.raises(ValueError, match=r"^kernel_size must be odd, got 4"):
        color.gaussian_blur(images, ones, 4)
    with pytest.raises(ValueError, match=r"^kernel_size must be at least 1, got -1"):
        color.gaussian_blur(images, ones, -1)
    with pytest.raises(ValueError, match=r"^factors must have shape"):
        color.color_jitter(images, torch.ones(2, 3), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(TypeError, match=r"^order must be int32 or int64"):
        color.color_jitter(images, torch.ones(2, 4), torch.zeros(2, 4))
