"""augment_views: every backend against Pillow's resize and torchvision's formulas, written out."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnF

from fastssl import functional as F
from fastssl.kernels.augment_views import COLUMNS, reference
from fastssl.kernels.common.dispatch import OPS
from tests.kernels.util import DEVICE, compiled_backends, device_of

Image = pytest.importorskip("PIL.Image")

BACKENDS = compiled_backends("augment_views")
ALL = ["reference", *BACKENDS]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SHAPES = ((37, 53), (1, 1), (24, 100), (41, 3), (64, 48))
SMALL_SHAPES = ((9, 12), (5, 7))


@dataclass(frozen=True)
class Batch:
    """The tensors of a call."""

    pixels: Tensor
    offsets: Tensor
    shapes: Tensor
    image: Tensor
    boxes: Tensor
    params: Tensor

    def __call__(self, backend: str | None, **options) -> Tensor:
        device = device_of(backend)
        options = {"size": (29, 35), "kernel_size": 5, **options}
        tensors = (value.to(device) for value in vars(self).values())
        return F.augment_views(*tensors, **options, backend=backend).cpu()

    def picture(self, view: int) -> Image.Image:
        """The crop that view is of, before the resize."""
        which = int(self.image[view])
        height, width = self.shapes[which].tolist()
        begin = int(self.offsets[which])
        pixels = self.pixels[begin : begin + height * width * 3].view(height, width, 3)
        return Image.fromarray(pixels.numpy()).crop(tuple(self.boxes[view].tolist()))

    def rows(self, chosen) -> "Batch":
        return replace(
            self, image=self.image[chosen], boxes=self.boxes[chosen], params=self.params[chosen]
        )


def number_of_views(backend: str, wanted: int, interpreted: int = 1) -> int:
    """Fewer where Triton interprets, at half a second for each."""
    return interpreted if backend == "triton" and DEVICE.type == "cpu" else wanted


def smooth(height: int, width: int) -> Tensor:
    """Colours that change as slowly as those of photographs, with some noise: [H, W, 3] uint8.

    Neither black nor white, beyond which a cubic filter's first pass is cut off."""
    coarse = 0.2 + 0.6 * torch.rand(1, 3, height // 8 + 2, width // 8 + 2)
    image = nnF.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    image = image + 0.03 * torch.randn(3, height, width)
    return (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous()


def noise(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)


def plain_params(views: int) -> Tensor:
    params = torch.zeros(views, len(COLUMNS))
    params[:, 2:5] = 1
    params[:, 6:10] = torch.arange(4.0)
    return params


def random_params(views: int, strength: float = 0.8) -> Tensor:
    params = plain_params(views)
    params[:, [0, 10, 12]] = (torch.rand(views, 3) < torch.tensor([0.5, 0.2, 0.3])).float()
    params[:, 1] = (torch.rand(views) < 0.8).float()
    params[:, 2:5] = 1 + strength * (2 * torch.rand(views, 3) - 1)
    params[:, 5] = torch.rand(views) - 0.5
    params[:, 6:10] = torch.rand(views, 4).argsort(dim=1).float()
    params[:, 11] = torch.where(torch.rand(views) < 0.5, 0.1 + 1.9 * torch.rand(views), 0.0)
    return params


def make_batch(views: int, make_image=smooth, shapes=SHAPES, params=random_params) -> Batch:
    images = [make_image(*shape).flatten() for shape in shapes]
    lengths = torch.tensor([len(image) for image in images])
    image = torch.arange(views) % len(shapes)
    shapes = torch.tensor(shapes)
    sizes = (torch.rand(views, 2) * shapes[image]).long() + 1  # of the boxes: height, width
    corners = (torch.rand(views, 2) * (shapes[image] - sizes + 1)).long()
    boxes = torch.cat([corners.flip(1), (corners + sizes).flip(1)], dim=1)
    offsets = lengths.cumsum(0) - lengths
    return Batch(torch.cat(images), offsets, shapes, image, boxes, params(views))


def pillow_resize(picture: Image.Image, size, interpolation: str) -> Tensor:
    """Horizontal, then vertical, one call each: from Pillow 13 on a single call may turn them."""
    picture = picture.resize((size[1], picture.height), FILTERS[interpolation])
    picture = picture.resize((size[1], size[0]), FILTERS[interpolation])
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(29, 35), (48, 40), (1, 3), (5, 90)], ids=str)
def test_resize_is_pillows_to_the_bit(size, interpolation, backend, poisoned_memory):
    views = number_of_views(backend, 20)
    batch = make_batch(views, noise, params=plain_params)
    out = batch(backend, size=size, interpolation=interpolation, dtype=torch.uint8)
    expected = [pillow_resize(batch.picture(r), size, interpolation) for r in range(views)]
    assert torch.equal(out, torch.stack(expected))


# Interpreted, a view of this size takes tens of seconds.
INTERPRETED = ("triton",) if DEVICE.type == "cpu" else ()
AT_REAL_SIZES = [
    pytest.param(name, marks=[*marks, pytest.mark.slow] if name in INTERPRETED else marks)
    for (name,), marks, _ in BACKENDS
]


@pytest.mark.parametrize("backend", AT_REAL_SIZES)
@pytest.mark.parametrize("interpolation", FILTERS)
def test_real_sizes(interpolation, backend, poisoned_memory):
    views = number_of_views(backend, 6, interpreted=2)
    batch = make_batch(views, noise, shapes=((375, 500), (1200, 40)))
    options = {"size": (224, 224), "kernel_size": 23, "interpolation": interpolation}
    torch.testing.assert_close(
        batch(backend, **options), batch("reference", **options), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("interpolation", FILTERS)
def test_resize_in_one_call_of_pillow(interpolation):
    """Whichever pass its version begins with."""
    batch = make_batch(60, params=plain_params)
    out = batch("reference", interpolation=interpolation)
    for r in range(60):
        resized = batch.picture(r).resize((35, 29), FILTERS[interpolation])
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        assert (out[r] * 255 - expected).abs().max() <= 2


def luma(image: Tensor) -> Tensor:
    return 0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def blend(image: Tensor, other: Tensor, factor: float) -> Tensor:
    return (factor * image + (1 - factor) * other).clamp(0, 1)


def turn_hue(image: Tensor, shift: float) -> Tensor:
    """To HSV and back by its six sectors, as torchvision publishes it."""
    red, green = image[0], image[1]
    high, low = image.amax(0), image.amin(0)
    chroma = high - low
    saturation = chroma / torch.where(high == 0, 1.0, high)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    to_red, to_green, to_blue = ((high - channel) / divisor for channel in image)
    hue = torch.where(high == green, 2 + to_red - to_blue, 4 + to_green - to_red)
    hue = torch.where(high == red, to_blue - to_green, hue)
    hue = (hue / 6 + 1 + shift).remainder(1)
    sector = (hue * 6).floor()
    f = hue * 6 - sector
    p = high * (1 - saturation)
    q = high * (1 - saturation * f)
    t = high * (1 - saturation * (1 - f))
    table = [(high, t, p), (q, high, p), (p, high, t), (p, q, high), (t, p, high), (high, p, q)]
    out = torch.zeros_like(image)
    for i, channels in enumerate(table):
        out = torch.where(sector.remainder(6) == i, torch.stack(channels), out)
    return out


def blurred(image: Tensor, sigma: float, kernel_size: int) -> Tensor:
    """By one kernel of two dimensions."""
    radius = kernel_size // 2
    x = torch.arange(-radius, radius + 1.0, dtype=torch.float64)
    kernel = torch.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(image.dtype)
    padded = nnF.pad(image[:, None], (radius,) * 4, mode="reflect")
    return nnF.conv2d(padded, kernel[None, None])[:, 0]


def written_out(image: Tensor, params: dict[str, float], kernel_size: int) -> Tensor:
    if params["flip"]:
        image = image.flip(2)
    if params["jitter"]:
        for position in ("first", "second", "third", "fourth"):
            if params[position] == 0:
                image = (params["brightness"] * image).clamp(0, 1)
            elif params[position] == 1:
                image = blend(image, luma(image).mean(), params["contrast"])
            elif params[position] == 2:
                image = blend(image, luma(image), params["saturation"])
            else:
                image = turn_hue(image, params["hue"])
    if params["grey"]:
        image = luma(image).expand(3, -1, -1)
    if params["sigma"]:
        image = blurred(image, params["sigma"], kernel_size)
    return torch.where(image >= 0.5, 1 - image, image) if params["solarize"] else image


@pytest.mark.parametrize("backend", ALL)
def test_formulas_written_out(backend):
    """Hundreds of draws, from Pillow's crop to the normalised view."""
    views = number_of_views(backend, 200, interpreted=6)
    batch = make_batch(views)
    out = batch(backend, mean=MEAN, std=STD)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    for r in range(views):
        crop = pillow_resize(batch.picture(r), (29, 35), "bicubic").double() / 255
        params = dict(zip(COLUMNS, batch.params[r].tolist(), strict=True))
        expected = (written_out(crop, params, 5) - mean) / std
        torch.testing.assert_close(out[r].double(), expected, atol=5e-5, rtol=0)


DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.uint8: 1.0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch_size", [None, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(dtype, patch_size, backend, poisoned_memory):
    batch = make_batch(number_of_views(backend, 24), noise)
    options = {"size": (32, 48), "kernel_size": 9, "dtype": dtype, "patch_size": patch_size}
    if dtype != torch.uint8:
        options |= {"mean": MEAN, "std": STD}
    out, expected = batch(backend, **options), batch("reference", **options)
    assert out.dtype == dtype and out.is_contiguous()
    difference = (out.double() - expected.double()).abs()
    assert (difference <= DTYPES[dtype] * expected.double().abs().clamp(min=1)).all()
    # Values that are rounded otherwise are few, but for the interpreter, which cuts bfloat16 off.
    if dtype != torch.float32 and (dtype, backend) != (torch.bfloat16, "triton"):
        assert (difference > 0).double().mean() < 0.02


@pytest.mark.parametrize("backend", ALL)
def test_patches_are_the_windows_of_a_convolution(backend):
    batch = make_batch(number_of_views(backend, 5))
    planes = batch(backend, size=(32, 48))
    patches = batch(backend, size=(32, 48), patch_size=16)
    weight = torch.randn(4, 3, 16, 16)
    product = nnF.conv2d(planes, weight, stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches @ weight.flatten(1).T, product, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ALL)
def test_a_crop_of_its_own_size_is_copied(backend):
    picture = noise(17, 19)
    batch = Batch(
        picture.flatten(),
        torch.tensor([0]),
        torch.tensor([[17, 19]]),
        torch.tensor([0, 0]),
        torch.tensor([[3, 2, 14, 15]] * 2),
        plain_params(2),
    )
    batch.params[1, 0] = 1
    plain, mirrored = batch(backend, size=(13, 11), dtype=torch.uint8)
    assert torch.equal(plain, picture[2:15, 3:14].permute(2, 0, 1))
    assert torch.equal(mirrored, plain.flip(2))


@pytest.mark.parametrize("backend", ALL)
def test_wide_kernels_and_sigmas_on_small_views(backend):
    """Reflected more than once; a sigma far beyond the kernel; one that is next to nothing."""
    views = number_of_views(backend, 4, interpreted=2)
    batch = make_batch(views, shapes=SMALL_SHAPES, params=plain_params)
    batch.params[:, 11] = torch.tensor([0.01, 2.0, 50.0, 1e4])[:views]
    for size in ((3, 2), (1, 5)):
        out = batch(backend, size=size, kernel_size=11)
        sharp = replace(batch, params=plain_params(views))("reference", size=size).double()
        assert (out[0] - sharp[0]).abs().max() < 1e-6
        for r in range(views):
            weights = torch.exp(-0.5 * (torch.arange(-5.0, 6) / batch.params[r, 11].double()) ** 2)
            rows, columns = (blur_matrix(side, weights / weights.sum()) for side in size)
            expected = rows @ sharp[r] @ columns.T
            torch.testing.assert_close(out[r].double(), expected, atol=1e-6, rtol=0)


def blur_matrix(side: int, weights: Tensor) -> Tensor:
    matrix = torch.zeros(side, side, dtype=torch.float64)
    there_and_back = [*range(side), *range(side - 2, 0, -1)]
    for y in range(side):
        for k, weight in enumerate(weights.tolist()):
            matrix[y, there_and_back[(y + k - 5) % len(there_and_back)]] += weight
    return matrix


@pytest.mark.parametrize("backend", ALL)
def test_rows_are_functions_of_themselves(backend):
    views = number_of_views(backend, 12, interpreted=2)
    batch = make_batch(views)
    out = batch(backend)
    order = torch.arange(views).flip(0)
    assert torch.equal(batch.rows(order)(backend), out[order])
    assert torch.equal(batch.rows(slice(1, 2))(backend), out[1:2])
    assert batch.rows(slice(0, 0))(backend).shape == (0, 3, 29, 35)
    assert torch.equal(batch(backend), out)


def test_threads_give_the_same_bits():
    batch = make_batch(12)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(batch("cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def arguments(batch: Batch, backend: str, patch_size: int | None) -> tuple:
    device = device_of(backend)
    tensors = tuple(value.to(device) for value in vars(batch).values())
    statistics = (list(MEAN), list(STD))
    options = ([16, 24], 3, "bicubic", *statistics, torch.bfloat16, patch_size, backend)
    return tensors + options


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("patch_size", [None, 8])
def test_opcheck(patch_size, backend):
    batch = make_batch(1, shapes=SMALL_SHAPES)
    assert OPS["augment_views"].reasons(batch.pixels.to(device_of(backend)))[backend] is None
    args = arguments(batch, backend, patch_size)
    torch.library.opcheck(torch.ops.fastssl.augment_views, args)


@pytest.mark.parametrize("backend", ALL)
def test_compiles_without_a_graph_break(backend):
    def call(*tensors):
        return F.augment_views(
            *tensors, size=(16, 24), kernel_size=3, mean=MEAN, std=STD, backend=backend
        )

    compiled = torch.compile(call, fullgraph=True)
    for views in (1, 2):
        batch = make_batch(views, shapes=SMALL_SHAPES)
        tensors = [value.to(device_of(backend)) for value in vars(batch).values()]
        torch.testing.assert_close(compiled(*tensors), call(*tensors))


def test_table_of_taps_holds_every_weight():
    for interpolation in FILTERS:
        for length, size in ((1, 7), (7, 1), (50, 50), (97, 96), (500, 224), (1000, 3)):
            matrix = reference.filter_matrix(length, size, interpolation, torch.device("cpu"))
            # 22 binary digits each, so the sum is off by at most half a unit per weight.
            taps = reference.max_taps(length, size, interpolation)
            assert ((matrix != 0).sum(1) <= taps).all()
            assert ((matrix.sum(1) - 2**reference.PRECISION).abs() <= taps / 2).all()


# What the tensors hold, on the CPU.
WRONG_VALUES = {
    "image must lie in 0 .. 4, got 5": ("image", 0, 5),
    "boxes must lie inside of their images and hold a pixel, got -1, 0, 2, 2 in 37 x 53": (
        ("boxes", 0, torch.tensor([-1, 0, 2, 2]))
    ),
    "boxes must lie inside of their images and hold a pixel, got 0, 0, 54, 2 in 37 x 53": (
        ("boxes", 0, torch.tensor([0, 0, 54, 2]))
    ),
    "boxes must lie inside of their images and hold a pixel, got 5, 4, 5, 6 in 37 x 53": (
        ("boxes", 0, torch.tensor([5, 4, 5, 6]))
    ),
    "offsets and shapes must lie inside of the": ("offsets", 4, 10**6),
    "got 65 x 48 at": ("shapes", 4, torch.tensor([65, 48])),
    "got -1 x 48 at": ("shapes", 4, torch.tensor([-1, 48])),
    "params must hold a permutation of 0 .. 3 in columns 6 .. 9, got 0, 1, 2, 2": (
        ("params", (0, slice(6, 10)), torch.tensor([0.0, 1, 2, 2]))
    ),
    "params must hold a hue of at most 0.5, got 0.6": ("params", (0, 5), 0.6),
    "params must hold a sigma >= 0, got nan": ("params", (0, 11), math.nan),
}


@pytest.mark.parametrize("message", WRONG_VALUES)
def test_cpp_refuses_values_that_do_not_fit(message):
    batch = make_batch(3)
    name, place, value = WRONG_VALUES[message]
    getattr(batch, name)[place] = value
    with pytest.raises(RuntimeError) as error:
        batch("cpp")
    assert message in str(error.value)


BAD = {
    "pixels must be a Tensor, got list": {"pixels": [1, 2]},
    "pixels must be uint8, got float32": {"pixels": torch.zeros(9)},
    "pixels must have 1 dimensions": {"pixels": torch.zeros(3, 3, dtype=torch.uint8)},
    "offsets must be int64, got int32": {"offsets": torch.zeros(5, dtype=torch.int32)},
    "shapes must have shape [B, 2] = [5, 2], got [5, 3]": {
        "shapes": torch.ones(5, 3, dtype=torch.int64)
    },
    "image must have 1 dimensions": {"image": torch.zeros(3, 1, dtype=torch.int64)},
    "boxes must have shape [R, 4] = [3, 4], got [2, 4]": {
        "boxes": torch.ones(2, 4, dtype=torch.int64)
    },
    "params must have shape [R, 13] = [3, 13], got [3, 12]": {"params": torch.zeros(3, 12)},
    "params must be float32, got float64": {"params": torch.zeros(3, 13).double()},
    "size must be (height, width), got 224": {"size": 224},
    "size must be at least 1, got 0": {"size": (0, 8)},
    "kernel_size must be odd, got 4": {"kernel_size": 4},
    "kernel_size must be at least 1, got 0": {"kernel_size": 0},
    "interpolation must be 'bilinear' or 'bicubic', got 'nearest'": {"interpolation": "nearest"},
    "mean and std must both be given or both None": {"mean": MEAN},
    "mean and std must be three numbers, std > 0": {"mean": MEAN, "std": (1.0, 0.0, 1.0)},
    "mean and std must be None for uint8 views": {
        "mean": MEAN, "std": STD, "dtype": torch.uint8,
    },
    "dtype must be float32 or bfloat16 or float16 or uint8, got torch.float64": {
        "dtype": torch.float64
    },
    "size must be divisible by patch_size = 5, got (8, 10)": {"patch_size": 5},
    "patch_size must be an int, got float": {"patch_size": 2.0},
    "backend must be one of": {"backend": "magic"},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {**vars(make_batch(3)), "size": (8, 10), "kernel_size": 3}
    F.augment_views(**good)
    with pytest.raises((TypeError, ValueError)) as error:
        F.augment_views(**{**good, **BAD[message]})
    assert message in str(error.value)
