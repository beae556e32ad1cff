"""The public op fastssl::augment_views: checks, backends, fake implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.kernels.augment_views import reference
from fastssl.kernels.augment_views.reference import COLUMNS
from fastssl.kernels.common import dispatch
from fastssl.kernels.common.checks import check_int, check_shape, check_tensor
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def _example(device: torch.device) -> tuple:
    return (torch.zeros(48, dtype=torch.uint8, device=device),)


OP = dispatch.register(
    "augment_views",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def augment_views(
    pixels: Tensor,  # [P] uint8
    offsets: Tensor,  # [B] int64
    shapes: Tensor,  # [B, 2] int64, (height, width)
    image: Tensor,  # [R] int64
    boxes: Tensor,  # [R, 4] int64, (left, top, right, bottom)
    params: Tensor,  # [R, 13] float32
    *,
    size: tuple[int, int],
    kernel_size: int,
    interpolation: str = "bicubic",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    patch_size: int | None = None,
    backend: str | None = None,
) -> Tensor:  # [R, 3, H, W] or [R, N, 3 * patch_size**2]
    """R views of one size of B decoded images; see __init__.py for what each is and for `params`.

    Image b is pixels[offsets[b]:] read as [height, width, 3], RGB; view r is of image[r], cropped
    to boxes[r] in whole pixels, which must lie inside the image and not be empty. What the tensors
    hold is checked on the CPU (RuntimeError); on a GPU wrong values are undefined.

    size: (height, width) of the views. kernel_size: odd, side of the blur's kernel in pixels.
    interpolation: "bilinear" or "bicubic", antialiased.
    mean, std: of the three channels, for values in [0, 1], which the result has without them. With
    dtype uint8 they must be None: values are 0 .. 255, rounded.
    patch_size: give N = H W / patch_size^2 patches in row-major order in place of planes, columns
    ordered like `weight.flatten(1)` of a convolution.

    Raises TypeError or ValueError for arguments that do not fit, naming them.
    """
    _check_tensors(pixels, offsets, shapes, image, boxes, params)
    _check_options(size, kernel_size, interpolation, dtype, patch_size)
    mean, std = _statistics(mean, std, dtype)
    name = dispatch.choose_backend(OP, backend, pixels)
    # Even the reference is an op of its own in a compiled graph: it reads values of its arguments.
    return torch.ops.fastssl.augment_views(
        *(x.contiguous() for x in (pixels, offsets, shapes, image, boxes, params)),
        *(list(size), kernel_size, interpolation, mean, std, dtype, patch_size, name),
    )


def _check_tensors(
    pixels: Tensor, offsets: Tensor, shapes: Tensor, image: Tensor, boxes: Tensor, params: Tensor
) -> None:
    check_tensor("pixels", pixels, dim=1, dtypes=(torch.uint8,))
    integers = {"dtypes": (torch.int64,), "device": pixels.device}
    check_tensor("offsets", offsets, dim=1, **integers)
    check_tensor("shapes", shapes, **integers)
    check_shape("shapes", shapes, (offsets.shape[0], 2), "[B, 2]")
    check_tensor("image", image, dim=1, **integers)
    check_tensor("boxes", boxes, **integers)
    check_shape("boxes", boxes, (image.shape[0], 4), "[R, 4]")
    check_tensor("params", params, dtypes=(torch.float32,), device=pixels.device)
    check_shape("params", params, (image.shape[0], len(COLUMNS)), f"[R, {len(COLUMNS)}]")


def _check_options(
    size: tuple[int, int],
    kernel_size: int,
    interpolation: str,
    dtype: torch.dtype,
    patch_size: int | None,
) -> None:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"size must be (height, width), got {size}")
    for side in size:
        check_int("size", side, 1)
    check_int("kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    if interpolation not in reference.SUPPORTS:
        known = " or ".join(map(repr, reference.SUPPORTS))
        raise ValueError(f"interpolation must be {known}, got {interpolation!r}")
    if dtype not in DTYPES:
        names = " or ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"dtype must be {names}, got {dtype}")
    if patch_size is not None:
        check_int("patch_size", patch_size, 1)
        if size[0] % patch_size or size[1] % patch_size:
            raise ValueError(
                f"size must be divisible by patch_size = {patch_size}, got {tuple(size)}"
            )


def _statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must both be given or both None, got {mean} and {std}")
    if mean is None:
        return [0.0] * 3, [1.0] * 3
    if dtype == torch.uint8:
        raise ValueError(f"mean and std must be None for uint8 views, got {mean} and {std}")
    mean, std = ([float(x) for x in values] for values in (mean, std))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must be three numbers, std > 0, got {mean} and {std}")
    return mean, std


@custom_op("fastssl::augment_views")
def _augment_views(
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
    dtype: torch.dtype,
    patch_size: int | None,
    backend: str,
) -> Tensor:
    sources = (pixels, offsets, shapes, image, boxes, params)
    options = (size, kernel_size, interpolation, mean, std, dtype, patch_size)
    if backend == "reference":
        return reference.augment_views(*sources, *options)
    out = _augment_views_fake(*sources, *options, backend)
    if backend == "cpp":
        cubic = interpolation == "bicubic"
        torch.ops.fastssl_csrc.augment_views(
            *(*sources, size, kernel_size, cubic, mean, std, patch_size or 0, out)
        )
    else:
        from fastssl.kernels.augment_views import triton_kernel

        triton_kernel.augment_views(
            *(*sources, size, kernel_size, interpolation, mean, std, patch_size, out)
        )
    return out


@_augment_views.register_fake
def _augment_views_fake(
    pixels, offsets, shapes, image, boxes, params, size, kernel_size, interpolation, mean, std,
    dtype, patch_size, backend,
):  # fmt: skip
    shape = (3, *size)
    if patch_size is not None:
        shape = (size[0] // patch_size * (size[1] // patch_size), 3 * patch_size**2)
    return pixels.new_empty((image.shape[0], *shape), dtype=dtype)


counts_no_flops(torch.ops.fastssl.augment_views)
