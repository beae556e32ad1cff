"""Views: the crop's bits, the colours of its rows, and what papers ask for."""

import colorsys
import weakref
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastssl import functional as F
from fastssl.data import views
from fastssl.data.batch import Batch
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
        images.append(values.clip(0, 255).astype(np.uint8))
        regions.append((0, 0, width, height) if rng.random() < 0.5 else (2, 3, width - 1, height))
    return images, regions


def uniforms(n: int, view: View, seed: int = 0):
    return F.keyed_uniform(torch.arange(n), view.num_uniforms, seed=seed, stream=F.STREAM_CROP)


def crops_of(view: View, images, regions, u):
    """By Pillow, one pass after the other: in one call some of its versions turn them round."""
    height, width = view.size
    crops = []
    for image, region, numbers in zip(images, regions, u.tolist(), strict=True):
        crop = Image.fromarray(image).crop(view.box(region, numbers))
        crop = crop.resize((width, crop.height), Image.Resampling.BICUBIC)
        crop = crop.resize((width, height), Image.Resampling.BICUBIC)
        if numbers[4] < view.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return torch.stack(crops)


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
        x = blurred(x, sigma, views.kernel_size(view.size))
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


def test_a_row_depends_on_its_own_arguments_only():
    images, regions = photos(11)
    u = uniforms(11, EVERYTHING)
    out = EVERYTHING(images, regions, u)
    assert torch.equal(out, EVERYTHING(images, regions, u.clone()))
    for i in range(11):
        one = slice(i, i + 1)
        assert torch.equal(EVERYTHING(images[one], regions[one], u[one])[0], out[i])
    backwards = EVERYTHING(images[::-1], regions[::-1], u.flip(0))
    assert torch.equal(backwards.flip(0), out)


def test_global_generators_are_left_alone():
    images, regions = photos(3)
    u = uniforms(3, EVERYTHING)
    state = torch.get_rng_state()
    EVERYTHING(images, regions, u)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (3, 41)])
def test_small_and_oblong_sizes(size):
    images, regions = photos(5)
    images[0], regions[0] = np.array([[[200, 30, 90]]], np.uint8), (0, 0, 1, 1)
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
    assert {side: views.kernel_size((side, side)) for side in sizes} == sizes
    assert views.kernel_size((224, 96)) == 9


def test_blur_is_like_pillows():
    image = Image.fromarray(photos(1)[0][0]).resize((96, 96))
    view = View((96, 96), (1.0, 1.0), (1.0, 1.0), flip=0.0, blur=1.0, sigma=(1.5, 1.5))
    out = view([np.array(image)], [(0, 0, 96, 96)], uniforms(1, view))[0].permute(1, 2, 0).numpy()
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
    with pytest.raises(ValueError, match=r"^uniforms must have shape .* 18\], got \[3, 5\]"):
        EVERYTHING(images, regions, u[:, :5])
    with pytest.raises(TypeError, match=r"^uniforms must be a Tensor, got list"):
        EVERYTHING(images, regions, u.tolist())
    wrong = r"^pictures, regions and uniforms must be equally many, got "
    with pytest.raises(ValueError, match=wrong + "2, 3 and 3"):
        EVERYTHING(images[:2], regions, u)
    with pytest.raises(ValueError, match=wrong + "3, 2 and 3"):
        EVERYTHING(images, regions[:2], u)
    with pytest.raises(TypeError, match=r"^number must be an int, got float"):
        View((4, 4), number=2.0)
    with pytest.raises(FrozenInstanceError):
        EVERYTHING.blur = 0.0


SIZES = [replace(EVERYTHING, size=(16, 16)), View((24, 20)), replace(EVERYTHING, size=(16, 16))]


def seen(of, indices, pictures, **options):
    rows = ((row, *one) for row, one in enumerate(zip(*pictures, strict=True)))
    return views.see_through(of, rows, indices, seed=3, epoch=1, **options)


def test_views_of_a_batch_are_each_views_own(monkeypatch):
    """Two sizes, a call for each, and back in order."""
    pictures, indices = photos(6), torch.arange(20, 26)
    made, real = [], F.augment_views
    monkeypatch.setattr(
        F,
        "augment_views",
        lambda *args, **options: made.append(options["size"]) or real(*args, **options),
    )
    rows, got = seen(SIZES, indices, pictures)
    assert made == [(16, 16), (24, 20)]
    assert rows == list(range(6)) and [v.shape[2:] for v in got] == [(16, 16), (24, 20), (16, 16)]
    for number, view in enumerate(SIZES):
        keys = {"seed": 3, "epoch": 1, "view": number, "stream": F.STREAM_CROP}
        u = F.keyed_uniform(indices, view.num_uniforms, **keys)
        assert torch.equal(got[number], view(*pictures, u))
    assert not torch.equal(got[0], got[2])


def test_views_do_not_depend_on_how_many_wait(monkeypatch):
    pictures, indices = photos(7), torch.arange(7)
    _, together = seen(SIZES, indices, pictures)
    monkeypatch.setattr(views, "_CHUNK_BYTES", 2 * pictures[0][0].size)
    rows, in_parts = seen(SIZES, indices, pictures)
    assert rows == list(range(7))
    assert all(map(torch.equal, in_parts, together))


@pytest.mark.parametrize("keep_decoded", [False, True])
def test_large_pictures_do_not_wait(keep_decoded):
    """Only what the views show of them does."""
    references = []

    def large_pictures():
        for row in range(4):
            assert sum(reference() is not None for reference in references) <= 1
            # One region is as wide as the picture, whose rows lie in one piece.
            picture = np.full((300, 400, 3), row, np.uint8)
            references.append(weakref.ref(picture))
            yield row, picture, (0, 0, 400 if row % 2 else 50, 40)
            del picture

    views_of = [View((16, 16), (1.0, 1.0), (10.0, 10.0))]
    _, got = views.see_through(
        views_of, large_pictures(), torch.arange(4), seed=0, keep_decoded=keep_decoded
    )
    assert len(references) == 4
    for row, view in enumerate(views.make_views(got)[0] if keep_decoded else got[0]):
        assert (view == row).all()


def test_no_pictures_make_views_of_no_rows():
    rows, got = views.see_through(SIZES, iter(()), torch.arange(4), seed=0)
    assert rows == [] and [tuple(v.shape) for v in got] == [(0, 3, *v.size) for v in SIZES]


def test_decoded_pictures_make_the_same_views_later():
    pictures, indices = photos(6), torch.arange(6)
    _, made = seen(SIZES, indices, pictures)
    _, decoded = seen(SIZES, indices, pictures, keep_decoded=True)
    batch = Batch((), indices, decoded=decoded).to("cpu").decoded
    assert all(map(torch.equal, views.make_views(batch), made))
    whole = sum(picture.size for picture in pictures[0])
    assert decoded.pixels.numel() < whole, "what no view shows is not sent"
    normalised = views.make_views(batch, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    for view, levels in zip(normalised, made, strict=True):
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
        assert ((view * std + mean) * 255 - levels).abs().max() < 0.51
