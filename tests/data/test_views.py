"""Views: the crop's bits, the colours of its rows, and what papers ask for."""

import colorsys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastssl import functional as F
from fastssl.data import views
from fastssl.data.transforms import RandomResizedCrop
from fastssl.data.views import View

# Position of each number that decides something, after the five of the crop.
JITTER, FACTORS, ORDER, GREY, BLUR, SIGMA, SOLARIZE = 5, 6, 10, 14, 15, 16, 17
EVERYTHING = View((24, 20), jitter=0.8, grey=0.3, blur=0.5, solarize=0.4, hue=0.2)


def photos(n: int, seed: int = 0):
    """n pictures of different sizes, smooth with some noise, and the parts of them to use."""
    rng = np.random.default_rng(seed)
    images, regions = [], []
    for _ in range(n):
        width, height = (int(side) for side in rng.integers(30, 60, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        values = np.array(coarse.resize((width, height))) + rng.normal(0, 8, (height, width, 3))
        images.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
        regions.append((0, 0, width, height) if rng.random() < 0.5 else (2, 3, width - 1, height))
    return images, regions


def uniforms(n: int, view: View, seed: int = 0):
    return F.keyed_uniform(torch.arange(n), view.num_uniforms, seed=seed, stream=F.STREAM_CROP)


def crops_of(view: View, images, regions, u):
    crop = RandomResizedCrop(view.size, view.scale, view.ratio, view.flip)
    numbers = u[:, :5].tolist()
    return torch.stack([crop(*one) for one in zip(images, regions, numbers, strict=True)])


def grey_of(x):
    return (x * [0.2989, 0.587, 0.114]).sum(axis=2, keepdims=True)


def turned(x, shift):
    def one(pixel):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((h + shift) % 1, s, v)

    return np.apply_along_axis(one, 2, x)


def blurred(x, sigma, kernel_size):
    radius = kernel_size // 2
    pdf = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    rows = np.apply_along_axis(np.convolve, 0, padded, pdf / pdf.sum(), mode="valid")
    return np.apply_along_axis(np.convolve, 1, rows, pdf / pdf.sum(), mode="valid")


def colored(view: View, crop, u):
    """One crop, uint8 [3, H, W], and all of its numbers -> float64 [H, W, 3] in levels."""
    x = crop.permute(1, 2, 0).double().numpy() / 255
    if u[JITTER] < view.jitter:
        strengths = (view.brightness, view.contrast, view.saturation)
        low = [max(0, 1 - s) for s in strengths] + [-view.hue]
        high = [1 + s for s in strengths] + [view.hue]
        b, c, s, h = np.array(low) + u[FACTORS : FACTORS + 4] * (np.array(high) - np.array(low))
        for which in np.argsort(u[ORDER : ORDER + 4], kind="stable"):
            x = [
                lambda x: x * b,
                lambda x: c * x + (1 - c) * grey_of(x).mean(),
                lambda x: s * x + (1 - s) * grey_of(x),
                lambda x: turned(x, h),
            ][which](x).clip(0, 1)
    if u[GREY] < view.grey:
        x = grey_of(x).repeat(3, axis=2)
    if u[BLUR] < view.blur:
        sigma = view.sigma[0] + u[SIGMA] * (view.sigma[1] - view.sigma[0])
        x = blurred(x, sigma, view.kernel_size)
    if u[SOLARIZE] < view.solarize:
        x = np.where(x >= 0.5, 1 - x, x)
    return x * 255


def test_bits_of_the_crop_are_kept_without_colour():
    view = View((24, 20), scale=(0.1, 0.9))
    images, regions = photos(12)
    u = uniforms(12, view)
    assert view.num_uniforms == RandomResizedCrop.num_uniforms == u.shape[1]
    out = view(images, regions, u)
    assert out.dtype == torch.uint8 and out.shape == (12, 3, 24, 20)
    assert torch.equal(out, crops_of(view, images, regions, u))


def test_without_colour_bytes_stay_bytes(monkeypatch):
    def refuse(*_):
        raise AssertionError("no colour was asked for")

    monkeypatch.setattr(View, "_color", refuse)
    view = View((8, 8), brightness=0.9)
    view(*photos(2), uniforms(2, view))
    view = replace(view, grey=0.5)
    with pytest.raises(AssertionError, match="no colour"):
        view(*photos(2), uniforms(2, view))


def test_the_crop_does_not_depend_on_the_colours():
    images, regions = photos(6)
    plain = View((24, 20))
    never = replace(plain, jitter=1e-9, blur=1e-9)
    assert never.num_uniforms == 18
    out = never(images, regions, uniforms(6, never))
    assert torch.equal(out, plain(images, regions, uniforms(6, plain)))


def test_a_view_is_the_published_formulas():
    n = 64
    images, regions = photos(n)
    u = uniforms(n, EVERYTHING)
    out = EVERYTHING(images, regions, u)
    crops = crops_of(EVERYTHING, images, regions, u)
    for i, numbers in enumerate(u.double().numpy()):
        expected = colored(EVERYTHING, crops[i], numbers).transpose(2, 0, 1)
        # Half a level of rounding, and float32 under it.
        assert np.abs(out[i].numpy() - expected).max() < 0.51
    drawn = u[:, [JITTER, GREY, BLUR, SOLARIZE]] < torch.tensor([0.8, 0.3, 0.5, 0.4])
    assert drawn.any(dim=0).all() and not drawn.all(dim=0).any()
    # A row that drew nothing keeps the bits of its crop.
    untouched = ~drawn.any(dim=1)
    assert untouched.any() and torch.equal(out[untouched], crops[untouched])


@pytest.mark.parametrize(
    ("name", "column"),
    [("jitter", JITTER), ("grey", GREY), ("blur", BLUR), ("solarize", SOLARIZE)],
)
def test_each_probability(name, column):
    images, regions = photos(16)
    # A blur of a tenth of a pixel is none.
    always = View((16, 16), sigma=(1.0, 2.0), **{name: 1.0})
    u = uniforms(16, always)
    crops = crops_of(always, images, regions, u)
    out = always(images, regions, u)
    assert all(not torch.equal(out[i], crops[i]) for i in range(16))
    half = replace(always, **{name: 0.5})(images, regions, u)
    for i in range(16):
        assert torch.equal(half[i], out[i] if u[i, column] < 0.5 else crops[i])
    # Zero is never, even for the smallest number.
    other, other_column = ("grey", GREY) if name != "grey" else ("blur", BLUR)
    u[:, column], u[:, other_column] = 0.0, 0.9
    never = View((16, 16), **{other: 0.5})
    assert torch.equal(never(images, regions, u), crops)


def test_factors_span_the_range_asked_for():
    view = View((4, 4), brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    ends = view._factors(torch.tensor([[0.0] * 4, [1.0] * 4]))
    torch.testing.assert_close(ends[0], torch.tensor([0.6, 0.0, 0.8, -0.1]))
    torch.testing.assert_close(ends[1], torch.tensor([1.4, 2.5, 1.2, 0.1]))


def test_a_row_depends_on_its_own_arguments_only(monkeypatch):
    images, regions = photos(11)
    u = uniforms(11, EVERYTHING)
    out = EVERYTHING(images, regions, u)
    assert torch.equal(out, EVERYTHING(images, regions, u.clone()))
    for i in range(11):
        one = slice(i, i + 1)
        assert torch.equal(EVERYTHING(images[one], regions[one], u[one])[0], out[i])
    backwards = EVERYTHING(images[::-1], regions[::-1], u.flip(0))
    assert torch.equal(backwards.flip(0), out)
    # Nor on how many are coloured at a time.
    monkeypatch.setattr(views, "_CHUNK", 3 * 24 * 20 * 4)
    assert torch.equal(EVERYTHING(images, regions, u), out)


def test_global_generators_are_left_alone():
    images, regions = photos(3)
    u = uniforms(3, EVERYTHING)
    state = torch.get_rng_state()
    EVERYTHING(images, regions, u)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (3, 41)])
def test_small_and_oblong_sizes(size):
    images, regions = photos(5)
    images[0], regions[0] = Image.new("RGB", (1, 1), (200, 30, 90)), (0, 0, 1, 1)
    view = View(size, jitter=1.0, hue=0.5, grey=0.5, blur=1.0, solarize=0.5)
    u = uniforms(5, view)
    out = view(images, regions, u)
    assert out.shape == (5, 3, *size) and out.dtype == torch.uint8
    crops = crops_of(view, images, regions, u)
    for i, numbers in enumerate(u.double().numpy()):
        expected = colored(view, crops[i], numbers).transpose(2, 0, 1)
        assert np.abs(out[i].numpy() - expected).max() < 0.51


def test_blur_kernel_is_a_tenth_of_the_side():
    sizes = {224: 23, 96: 9, 64: 7, 40: 5, 32: 3, 1: 3}
    assert {side: View((side, side)).kernel_size for side in sizes} == sizes
    assert View((224, 96)).kernel_size == 9


def test_blur_is_like_pillows():
    values = np.array(photos(1)[0][0].resize((96, 96)))
    view = View((96, 96), (1.0, 1.0), (1.0, 1.0), flip=0.0, blur=1.0, sigma=(1.5, 1.5))
    image = Image.fromarray(values)
    out = view([image], [(0, 0, 96, 96)], uniforms(1, view))[0].permute(1, 2, 0).numpy()
    theirs = np.array(image.filter(ImageFilter.GaussianBlur(1.5)))
    inner = (slice(8, -8), slice(8, -8))
    assert np.abs(out[inner].astype(int) - theirs[inner]).max() <= 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", (0, 4)),
        ("scale", (0.5, 0.2)),
        ("ratio", (0.0, 1.0)),
        ("flip", 1.5),
        ("jitter", -0.1),
        ("grey", 1.1),
        ("blur", float("nan")),
        ("solarize", 2),
        ("brightness", -0.4),
        ("contrast", float("inf")),
        ("saturation", -1),
        ("hue", 0.6),
        ("sigma", (0.0, 1.0)),
        ("sigma", (2.0, 1.0)),
        ("sigma", (1.0,)),
        ("number", 0),
    ],
)
def test_wrong_fields_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        View(**{"size": (4, 4), name: value})


def test_wrong_arguments_are_named():
    images, regions = photos(3)
    u = uniforms(3, EVERYTHING)
    with pytest.raises(ValueError, match=r"^uniforms must have shape .* = \[3, 18\], got \[3, 5\]"):
        EVERYTHING(images, regions, u[:, :5])
    with pytest.raises(ValueError, match=r"^uniforms must have shape .* = \[2, 18\]"):
        EVERYTHING(images[:2], regions, u)
    with pytest.raises(TypeError, match=r"^uniforms must be a Tensor, got list"):
        EVERYTHING(images, regions, u.tolist())
    with pytest.raises(ValueError, match=r"^images and regions must .* got 3 and 2"):
        EVERYTHING(images, regions[:2], u)
    with pytest.raises(ValueError, match=r"^images and regions must .* got 0 and 0"):
        EVERYTHING([], [], u[:0])
    with pytest.raises(TypeError, match=r"^number must be an int, got float"):
        View((4, 4), number=2.0)
    with pytest.raises(FrozenInstanceError):
        EVERYTHING.blur = 0.0
