"""augment_views in Triton: five launches for all views. R views of H x W pixels.

1. the horizontal pass of the resize, to bytes [R, 3, rows of the highest box, W];
2. the vertical pass, the jitter up to the contrast, and sums of the luma per block of pixels;
3. the rest of the jitter and grey; views without blur are finished here;
4. and 5. the passes of the blur.

Programs of the same view meet in memory only, sums in an order that the sizes fix. The tables of
the filters are made by PyTorch, to the same bits as everywhere; how large they are depends on the
boxes, for which the host waits.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.augment_views.reference import COLUMNS, filter_table, max_taps
from fastssl.kernels.common.triton_utils import AotCase, cdiv, next_power_of_2


@dataclass(frozen=True)
class Config:
    """One program makes BLOCK pixels of one view."""

    BLOCK: int = 1024
    num_warps: int = 4


CONFIG = Config()
_NUM_PARAMS = tl.constexpr(len(COLUMNS))
_FLIP, _JITTER, _FACTORS, _ORDER, _GREY, _SIGMA, _SOLARIZE = map(
    tl.constexpr, (0, 1, 2, 6, 10, 11, 12)
)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = map(tl.constexpr, range(4))


@triton.jit
def _to_8_bits(sums):
    """From units of 2^-22."""
    return tl.minimum(tl.maximum((sums + (1 << 21)) >> 22, 0), 255).to(tl.uint8)


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _luma(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _store_planes(ptr, r, g, b, plane, valid):
    tl.store(ptr, r, mask=valid)
    tl.store(ptr + plane, g, mask=valid)
    tl.store(ptr + 2 * plane, b, mask=valid)


@triton.jit
def _resize_columns_kernel(
    pixels_ptr,  # uint8
    offsets_ptr,  # [B] int64
    shapes_ptr,  # [B, 2] int64
    image_ptr,  # [R] int64
    boxes_ptr,  # [R, 4] int64
    params_ptr,  # [R, 13]
    starts_ptr,  # [R, W] int32
    weights_ptr,  # [R, W, taps] int32
    out_ptr,  # [R, 3, rows, W] uint8
    rows,
    W,
    taps,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64)
    image = tl.load(image_ptr + view)
    stride = tl.load(shapes_ptr + 2 * image + 1)
    left, top = tl.load(boxes_ptr + 4 * view), tl.load(boxes_ptr + 4 * view + 1)
    width = tl.load(boxes_ptr + 4 * view + 2) - left
    height = tl.load(boxes_ptr + 4 * view + 3) - top
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y, x = p // W, p % W
    valid = y < height
    column = tl.where(tl.load(params_ptr + _NUM_PARAMS * view + _FLIP) > 0, W - 1 - x, x)
    start = tl.load(starts_ptr + view * W + column)
    weight_ptr = weights_ptr + (view * W + column) * taps
    pixel_ptr = pixels_ptr + tl.load(offsets_ptr + image) + ((top + y) * stride + left) * 3
    r = tl.zeros((BLOCK,), tl.int32)
    g, b = r, r
    for k in range(taps):
        inside = valid & (start + k < width)
        weight = tl.load(weight_ptr + k)
        source = pixel_ptr + (start + k) * 3
        r += weight * tl.load(source, mask=inside, other=0).to(tl.int32)
        g += weight * tl.load(source + 1, mask=inside, other=0).to(tl.int32)
        b += weight * tl.load(source + 2, mask=inside, other=0).to(tl.int32)
    plane = rows * W
    r, g, b = _to_8_bits(r), _to_8_bits(g), _to_8_bits(b)
    _store_planes(out_ptr + view * 3 * plane + p, r, g, b, plane, valid)


@triton.jit
def _turn_hue(r, g, b, shift):
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    sector = tl.where(g == value, 2 * chroma + b - r, 4 * chroma + r - g)
    sector = tl.where(r == value, g - b, sector)
    hue = sector / tl.where(chroma == 0, 1.0, chroma) + 6 * shift
    r = _hue_channel(value, chroma, hue + 5)
    g = _hue_channel(value, chroma, hue + 3)
    return r, g, _hue_channel(value, chroma, hue + 1)


@triton.jit
def _hue_channel(value, chroma, phase):
    phase -= 6 * tl.floor(phase / 6)
    return value - chroma * _clip(tl.minimum(phase, 4 - phase))


@triton.jit
def _jitter(r, g, b, params_ptr, first, last, mean):
    """Positions first .. last - 1 of the order of a view."""
    for i in range(first, last):
        which = tl.load(params_ptr + _ORDER + i).to(tl.int32)
        factor = tl.load(params_ptr + _FACTORS + which)
        if which == _HUE:
            r, g, b = _turn_hue(r, g, b, factor)
        else:
            other = tl.zeros_like(r)
            if which == _CONTRAST:
                other += mean
            if which == _SATURATION:
                other += _luma(r, g, b)
            # Brightness blends with black, of which there may be more than one.
            other *= 1 - factor
            r = _clip(r * factor + other)
            g = _clip(g * factor + other)
            b = _clip(b * factor + other)
    return r, g, b


@triton.jit
def _place_of_contrast(params_ptr):
    place = 0
    for i in tl.static_range(4):
        place = tl.where(tl.load(params_ptr + _ORDER + i) == _CONTRAST, i, place)
    return place


@triton.jit
def _resize_rows_kernel(
    resized_ptr,  # [R, 3, rows, W] uint8
    boxes_ptr,  # [R, 4] int64
    params_ptr,  # [R, 13]
    starts_ptr,  # [R, H] int32
    weights_ptr,  # [R, H, taps] int32
    planes_ptr,  # [R, 3, H, W]
    sums_ptr,  # [R, blocks], of the luma
    rows,
    H,
    W,
    taps,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64)
    height = tl.load(boxes_ptr + 4 * view + 3) - tl.load(boxes_ptr + 4 * view + 1)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = p < H * W
    y, x = tl.where(valid, p // W, 0), p % W
    start = tl.load(starts_ptr + view * H + y)
    weight_ptr = weights_ptr + (view * H + y) * taps
    plane = rows * W
    resized_ptr += view * 3 * plane
    r = tl.zeros((BLOCK,), tl.int32)
    g, b = r, r
    for k in range(taps):
        inside = valid & (start + k < height)
        weight = tl.load(weight_ptr + k)
        source = resized_ptr + (start + k) * W + x
        r += weight * tl.load(source, mask=inside, other=0).to(tl.int32)
        g += weight * tl.load(source + plane, mask=inside, other=0).to(tl.int32)
        b += weight * tl.load(source + 2 * plane, mask=inside, other=0).to(tl.int32)
    red = _to_8_bits(r).to(tl.float32) * (1 / 255)
    green = _to_8_bits(g).to(tl.float32) * (1 / 255)
    blue = _to_8_bits(b).to(tl.float32) * (1 / 255)
    params_ptr += _NUM_PARAMS * view
    if tl.load(params_ptr + _JITTER) > 0:
        last = _place_of_contrast(params_ptr)
        red, green, blue = _jitter(red, green, blue, params_ptr, 0, last, 0.0)
    luma = tl.where(valid, _luma(red, green, blue), 0.0)
    tl.store(sums_ptr + view * tl.num_programs(1) + tl.program_id(1), tl.sum(luma, axis=0))
    _store_planes(planes_ptr + view * 3 * H * W + p, red, green, blue, H * W, valid)


@triton.jit
def _finished(x, channel, statistics_ptr, solarize, dtype: tl.constexpr):
    x = tl.where(solarize, tl.minimum(x, 1 - x), x)
    if dtype == tl.uint8:
        # Adding 2^23 rounds to whole numbers, ties to even.
        x = (x * 255 + 8388608.0) - 8388608.0
    else:
        mean, std = tl.load(statistics_ptr + channel), tl.load(statistics_ptr + 3 + channel)
        x = (x - mean) / std
    return x.to(dtype)


@triton.jit
def _finish(r, g, b, statistics_ptr, params_ptr, out_ptr, p, H, W, patch, valid):
    """Solarise, normalise and store the pixels p of a view; `patch` is 0 for planes."""
    solarize = tl.load(params_ptr + _SOLARIZE) > 0
    r = _finished(r, 0, statistics_ptr, solarize, out_ptr.dtype.element_ty)
    g = _finished(g, 1, statistics_ptr, solarize, out_ptr.dtype.element_ty)
    b = _finished(b, 2, statistics_ptr, solarize, out_ptr.dtype.element_ty)
    place, plane = p, H * W
    if patch > 0:
        y, x = p // W, p % W
        token = y // patch * (W // patch) + x // patch
        plane = patch * patch
        place = token * 3 * plane + y % patch * patch + x % patch
    _store_planes(out_ptr + place, r, g, b, plane, valid)


@triton.jit
def _color_kernel(
    planes_ptr,  # [R, 3, H, W]
    sums_ptr,  # [R, blocks]
    params_ptr,  # [R, 13]
    statistics_ptr,  # [2, 3] mean and std
    out_ptr,
    H,
    W,
    patch,
    BLOCK: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(1)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = p < H * W
    params_ptr += _NUM_PARAMS * view
    planes_ptr += view * 3 * H * W + p
    r = tl.load(planes_ptr, mask=valid, other=0.0)
    g = tl.load(planes_ptr + H * W, mask=valid, other=0.0)
    b = tl.load(planes_ptr + 2 * H * W, mask=valid, other=0.0)
    if tl.load(params_ptr + _JITTER) > 0:
        i = tl.arange(0, BLOCK_SUMS)
        sums = tl.load(sums_ptr + view * blocks + i, mask=i < blocks, other=0.0)
        first = _place_of_contrast(params_ptr)
        r, g, b = _jitter(r, g, b, params_ptr, first, 4, tl.sum(sums, axis=0) / (H * W))
    if tl.load(params_ptr + _GREY) > 0:
        r = _luma(r, g, b)
        g, b = r, r
    if tl.load(params_ptr + _SIGMA) > 0:
        _store_planes(planes_ptr, r, g, b, H * W, valid)
    else:
        out_ptr += view * 3 * H * W
        _finish(r, g, b, statistics_ptr, params_ptr, out_ptr, p, H, W, patch, valid)


@triton.jit
def _blur(planes_ptr, plane, place, step, length, other, sigma, valid, RADIUS: tl.constexpr):
    """The Gaussian along a dimension: around `place` of `length`, `step` apart, from `other` on."""
    r = tl.zeros_like(place).to(tl.float32)
    g, b = r, r
    norm = 0.0
    period = tl.maximum(2 * (length - 1), 1)
    for k in range(-RADIUS, RADIUS + 1):
        # There and back again; the remainder is taken of what is not negative.
        there = (place + k + period * (RADIUS // period + 1)) % period
        source = planes_ptr + tl.minimum(there, period - there) * step + other
        distance = k / sigma
        weight = tl.exp(-0.5 * distance * distance)
        norm += weight
        r += weight * tl.load(source, mask=valid, other=0.0)
        g += weight * tl.load(source + plane, mask=valid, other=0.0)
        b += weight * tl.load(source + 2 * plane, mask=valid, other=0.0)
    return r / norm, g / norm, b / norm


@triton.jit
def _blur_rows_kernel(
    planes_ptr,  # [R, 3, H, W]
    params_ptr,  # [R, 13]
    blurred_ptr,  # [R, 3, H, W]
    H,
    W,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64)
    sigma = tl.load(params_ptr + _NUM_PARAMS * view + _SIGMA)
    if sigma > 0:
        p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        valid, row = p < H * W, p // W * W
        planes_ptr += view * 3 * H * W
        r, g, b = _blur(planes_ptr, H * W, p - row, 1, W, row, sigma, valid, RADIUS)
        _store_planes(blurred_ptr + view * 3 * H * W + p, r, g, b, H * W, valid)


@triton.jit
def _blur_columns_kernel(
    blurred_ptr,  # [R, 3, H, W]
    params_ptr,  # [R, 13]
    statistics_ptr,  # [2, 3]
    out_ptr,
    H,
    W,
    patch,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(0).to(tl.int64)
    params_ptr += _NUM_PARAMS * view
    sigma = tl.load(params_ptr + _SIGMA)
    if sigma > 0:
        p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        valid = p < H * W
        blurred_ptr += view * 3 * H * W
        r, g, b = _blur(blurred_ptr, H * W, p // W, W, H, p % W, sigma, valid, RADIUS)
        out_ptr += view * 3 * H * W
        _finish(r, g, b, statistics_ptr, params_ptr, out_ptr, p, H, W, patch, valid)


@functools.lru_cache(maxsize=64)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """[2, 3] float32. Kept, since the host waits for a copy to a GPU."""
    return torch.tensor([mean, std], dtype=torch.float32).to(device)


def augment_views(
    pixels: Tensor,
    offsets: Tensor,
    shapes: Tensor,
    image: Tensor,
    boxes: Tensor,
    params: Tensor,
    size: Sequence[int],
    kernel_size: int,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int | None,
    out: Tensor,
) -> None:
    """Fill out, of R views of `size`."""
    if out.numel() == 0:
        return
    (H, W), R = size, image.shape[0]
    extents = boxes[:, 2:] - boxes[:, :2]
    largest_w, rows = extents.amax(dim=0).tolist()
    columns = _int_table(extents[:, 0], W, max_taps(largest_w, W, interpolation), interpolation)
    lines = _int_table(extents[:, 1], H, max_taps(rows, H, interpolation), interpolation)
    resized = pixels.new_empty((R, 3, rows, W))
    planes, blurred = (params.new_empty((R, 3, H, W)) for _ in range(2))
    blocks = cdiv(H * W, CONFIG.BLOCK)
    sums = params.new_empty((R, blocks))
    statistics = _statistics(tuple(mean), tuple(std), params.device)
    patch, radius = patch_size or 0, kernel_size // 2
    grid, tile = (R, blocks), {"BLOCK": CONFIG.BLOCK, "num_warps": CONFIG.num_warps}
    _resize_columns_kernel[R, cdiv(rows * W, CONFIG.BLOCK)](
        *(pixels, offsets, shapes, image, boxes, params, *columns, resized),
        *(rows, W, columns[1].shape[2]),
        **tile,
    )
    _resize_rows_kernel[grid](
        resized, boxes, params, *lines, planes, sums, rows, H, W, lines[1].shape[2], **tile
    )
    _color_kernel[grid](
        *(planes, sums, params, statistics, out, H, W, patch),
        BLOCK_SUMS=next_power_of_2(blocks),
        **tile,
    )
    _blur_rows_kernel[grid](planes, params, blurred, H, W, RADIUS=radius, **tile)
    _blur_columns_kernel[grid](blurred, params, statistics, out, H, W, patch, RADIUS=radius, **tile)


def _int_table(
    lengths: Tensor, size: int, taps: int, interpolation: str
) -> tuple[Tensor, Tensor]:  # [R, size], [R, size, taps]
    start, weights = filter_table(lengths, size, taps, interpolation)
    return start.int(), weights.int()


def aot_cases() -> list[AotCase]:
    block = {"BLOCK": CONFIG.BLOCK}
    images = {"pixels_ptr": "*u8", "offsets_ptr": "*i64", "shapes_ptr": "*i64", "image_ptr": "*i64"}
    boxes, params = {"boxes_ptr": "*i64"}, {"params_ptr": "*fp32"}
    tables = {"starts_ptr": "*i32", "weights_ptr": "*i32"}
    planes, sums, blurred = ({f"{name}_ptr": "*fp32"} for name in ("planes", "sums", "blurred"))
    grid, patch = {"H": "i32", "W": "i32"}, {"patch": "i32"}
    taps = {"rows": "i32", "W": "i32", "taps": "i32"}
    made = [
        AotCase(
            _resize_columns_kernel,
            images | boxes | params | tables | {"out_ptr": "*u8"} | taps,
            block,
            CONFIG.num_warps,
        ),
        AotCase(
            _resize_rows_kernel,
            {"resized_ptr": "*u8"} | boxes | params | tables | planes | sums | taps | grid,
            block,
            CONFIG.num_warps,
        ),
        AotCase(
            _blur_rows_kernel,
            planes | params | blurred | grid,
            block | {"RADIUS": 11},
            CONFIG.num_warps,
        ),
    ]
    for dtype in ("fp32", "bf16", "u8"):
        result = params | {"statistics_ptr": "*fp32", "out_ptr": f"*{dtype}"} | grid | patch
        made += [
            AotCase(
                _color_kernel,
                planes | sums | result,
                block | {"BLOCK_SUMS": 128},
                CONFIG.num_warps,
                variant=dtype,
            ),
            AotCase(
                _blur_columns_kernel,
                blurred | result,
                block | {"RADIUS": 11},
                CONFIG.num_warps,
                variant=dtype,
            ),
        ]
    return made
