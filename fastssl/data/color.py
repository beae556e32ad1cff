"""Colour augmentation of a batch, each image with parameters of its own.

Images are [B, 3, H, W], floating point, RGB in [0, 1]; so are the results, in new memory. The
definitions are torchvision's. A row of a result depends on the same row of the arguments only, so
that a batch may be split over processes; what could hinder this, a sum or an exponential rounded
in an order that depends on the batch, is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as nnF

from fastssl.kernels.common.checks import INDEX_DTYPES, check_int, check_shape, check_tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601


def to_grey(images: Tensor) -> Tensor:
    """0.2989 R + 0.587 G + 0.114 B in all three channels."""
    _check(images)
    return _luma(images).repeat(1, 3, 1, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """factor * images, clipped. factor [B] >= 0: 0 is black, 1 the image itself."""
    _check(images, factor=factor)
    return (images * _per_image(factor, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Distances from the mean of the grey image, times factor [B] >= 0; clipped."""
    _check(images, factor=factor)
    mean = _luma(images).flatten(1).mean(dim=1, dtype=torch.float64)
    return _blend(images, _per_image(mean, images), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Distances from the grey image, times factor [B] >= 0; clipped."""
    _check(images, factor=factor)
    return _blend(images, _luma(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by shift [B], in turns: 0.5 and -0.5 give the complementary colour."""
    _check(images, shift=shift)
    red, green, blue = images.unbind(dim=1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    hue = torch.where(
        red == value,
        green - blue,
        torch.where(green == value, 2 * chroma + blue - red, 4 * chroma + red - green),
    )
    # In sixths of a turn. A grey pixel has none, and is left alone by the chroma of 0 below.
    hue = hue.div_(torch.where(chroma == 0, 1, chroma)).unsqueeze_(1)
    # A channel is `value` within a sixth of a turn of its own hue, `value - chroma` within one of
    # the opposite hue, and linear in between.
    phase = torch.tensor((5.0, 3.0, 1.0), dtype=images.dtype, device=images.device)
    phase = hue + (6 * _per_image(shift, images) + phase.reshape(1, 3, 1, 1))
    phase -= 6 * (phase / 6).floor_()
    share = torch.minimum(phase, 4 - phase).clamp_(0, 1)
    return value.unsqueeze(1) - share.mul_(chroma.unsqueeze(1))


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in an order of its own for every image.

    factors: [B, 4], for the four in the order named.
    order: [B, 4] integers, a permutation of 0..3 in every row: which of the four comes 1st, ...
    """
    _check(images)
    check_tensor("factors", factors, device=images.device)
    check_shape("factors", factors, (images.shape[0], 4), "[B, 4]")
    check_tensor("order", order, dtypes=INDEX_DTYPES, device=images.device)
    check_shape("order", order, (images.shape[0], 4), "[B, 4]")
    images = images.clone(memory_format=torch.contiguous_format)
    for chosen in order.unbind(dim=1):
        for which, adjust in enumerate(ADJUSTMENTS):
            apply_to_rows(images, chosen == which, adjust, factors[:, which])
    return images


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Convolve with a Gaussian cut to kernel_size x kernel_size pixels and normalised to sum 1.

    sigma: [B], the standard deviation in pixels, > 0.
    kernel_size: odd. Borders are reflected (the border pixel itself is not repeated), as often as
        a kernel wider than the image asks for.
    """
    _check(images, sigma=sigma)
    check_int("kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    if not images.numel():
        # A convolution of no groups is refused.
        return images.clone()
    B, C, H, W = images.shape
    radius = kernel_size // 2
    distances = torch.arange(-radius, radius + 1, dtype=torch.float64, device=images.device)
    weights = (-0.5 * (distances / sigma.double().unsqueeze(1)).square()).exp()
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(images.dtype)
    weights = weights.repeat_interleave(C, dim=0)  # [B * C, kernel_size]
    padded = images.index_select(2, _reflected(H, radius, images.device))
    padded = padded.index_select(3, _reflected(W, radius, images.device))
    # Every channel of every image is a group of its own, with its own kernel.
    planes = padded.reshape(1, B * C, H + 2 * radius, W + 2 * radius)
    planes = nnF.conv2d(planes, weights[:, None, None, :], groups=B * C)
    planes = nnF.conv2d(planes, weights[:, None, :, None], groups=B * C)
    return planes.reshape(B, C, H, W)


def solarize(images: Tensor, threshold: float = 0.5) -> Tensor:
    """1 - x where x >= threshold, else x."""
    _check(images)
    return torch.where(images >= threshold, 1 - images, images)


def apply_to_rows(
    images: Tensor, chosen: Tensor, op: Callable[..., Tensor], *parameters: Tensor
) -> None:
    """In place, images[chosen] = op(images[chosen], *(p[chosen] for p in parameters))."""
    rows = chosen.nonzero().squeeze(1)
    if rows.numel():
        result = op(images.index_select(0, rows), *(p.index_select(0, rows) for p in parameters))
        images.index_copy_(0, rows, result)


def _check(images: Tensor, **parameters: Tensor) -> None:
    check_tensor("images", images)
    check_shape("images", images, (None, 3, None, None), "[B, 3, H, W]")
    for name, value in parameters.items():
        check_tensor(name, value, device=images.device)
        check_shape(name, value, images.shape[:1], "[B]")


def _luma(images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 1, H, W]
    red, green, blue = images.split(1, dim=1)
    return (LUMA[0] * red).add_(LUMA[1] * green).add_(LUMA[2] * blue)


def _per_image(values: Tensor, images: Tensor) -> Tensor:  # [B] -> [B, 1, 1, 1]
    return values.to(images.dtype).reshape(-1, 1, 1, 1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor, images)
    return (images * factor).add_(other * (1 - factor)).clamp_(0, 1)


def _reflected(n: int, radius: int, device: torch.device) -> Tensor:
    """[n + 2 * radius] int64, where the pixels of a side of n come from after padding."""
    # There and back again without repeating either end; one pixel is its own reflection.
    period = max(2 * (n - 1), 1)
    places = torch.arange(-radius, n + radius, device=device) % period
    return torch.minimum(places, period - places)
