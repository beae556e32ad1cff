"""The specification of augment_views in eager PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as nnF

COLUMNS = (
    *("flip", "jitter", "brightness", "contrast", "saturation", "hue"),
    *("first", "second", "third", "fourth", "grey", "sigma", "solarize"),
)
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601
# Binary digits of the weights of a resize.
PRECISION = 22
# How far a filter reaches, in pixels of the smaller of the two images.
SUPPORTS = {"bilinear": 1.0, "bicubic": 2.0}


def augment_views(
    pixels: Tensor,  # uint8, of all images
    offsets: Tensor,  # [B] int64, where each image begins
    shapes: Tensor,  # [B, 2] int64, (height, width)
    image: Tensor,  # [R] int64
    boxes: Tensor,  # [R, 4] int64, (left, top, right, bottom)
    params: Tensor,  # [R, 13] float32
    size: Sequence[int],
    kernel_size: int,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    patch_size: int | None,
) -> Tensor:  # [R, 3, H, W] or [R, N, 3 * patch_size**2]
    crops = [pixels.new_empty((0, 3, *size))]
    for which, (left, top, right, bottom) in zip(image.tolist(), boxes.tolist(), strict=True):
        height, width = shapes[which].tolist()
        picture = pixels[offsets[which] :][: height * width * 3].reshape(height, width, 3)
        crops.append(resize(picture[top:bottom, left:right], size, interpolation).unsqueeze(0))
    views = color(torch.cat(crops).float() / 255, params, kernel_size)
    if dtype == torch.uint8:
        views = (views * 255).round()
    else:
        views = (views - views.new_tensor(mean).view(3, 1, 1)) / views.new_tensor(std).view(3, 1, 1)
    if patch_size is not None:
        views = nnF.unfold(views, patch_size, stride=patch_size).transpose(1, 2)
    return views.to(dtype, memory_format=torch.contiguous_format)


def resize(picture: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    """uint8 [h, w, 3] -> uint8 [3, H, W]. The sums are of integers below 2^53, exact in float64."""
    planes = picture.permute(2, 0, 1).double()
    columns = filter_matrix(planes.shape[2], size[1], interpolation, picture.device)
    planes = _to_8_bits(planes @ columns.T)
    rows = filter_matrix(planes.shape[1], size[0], interpolation, picture.device)
    return _to_8_bits(rows @ planes).to(torch.uint8)


def filter_matrix(
    length: int, size: int, interpolation: str, device: torch.device
) -> Tensor:  # [size, length] float64
    """Weights, in units of 2^-PRECISION, that take a row of `length` pixels to one of `size`."""
    lengths = torch.tensor([length], device=device)
    taps = max_taps(length, size, interpolation)
    start, weights = filter_table(lengths, size, taps, interpolation)
    matrix = weights.new_zeros((size, length + taps))
    matrix.scatter_(1, start[0, :, None] + torch.arange(taps, device=device), weights[0])
    return matrix[:, :length]


def max_taps(length: int, size: int, interpolation: str) -> int:
    """More pixels of a row of `length` than any pixel of one of `size` is made of."""
    return 2 * int(SUPPORTS[interpolation] * max(length / size, 1.0)) + 3


def filter_table(
    lengths: Tensor,  # [R] int64
    size: int,
    taps: int,
    interpolation: str,
) -> tuple[Tensor, Tensor]:  # [R, size] int64, [R, size, taps] float64
    """Where in its row each pixel of the result begins to read, and its weights."""
    scale = (lengths.double() / size).unsqueeze(1)
    # Antialiasing: the filter is as wide in the result as it is in the source.
    reach = scale.clamp(min=1.0)
    support = SUPPORTS[interpolation] * reach
    center = (torch.arange(size, dtype=torch.float64, device=lengths.device) + 0.5) * scale
    start = (center - support + 0.5).clamp(min=0).floor()
    stop = torch.minimum((center + support + 0.5).floor(), lengths.double().unsqueeze(1))
    places = start.unsqueeze(2) + torch.arange(taps, device=lengths.device)
    distances = (places - center.unsqueeze(2) + 0.5) / reach.unsqueeze(2)
    weights = _FILTERS[interpolation](distances.abs())
    weights = torch.where(places < stop.unsqueeze(2), weights, 0.0)
    weights = weights / weights.sum(dim=2, keepdim=True) * 2**PRECISION
    # Halves are rounded away from zero.
    return start.long(), weights.sign() * (weights.abs() + 0.5).floor()


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _triangle, "bicubic": _cubic}


def _to_8_bits(sums: Tensor) -> Tensor:
    return (sums / 2**PRECISION + 0.5).floor().clamp(0, 255)


def color(
    images: Tensor,  # [R, 3, H, W] in [0, 1]
    params: Tensor,  # [R, 13]
    kernel_size: int,
) -> Tensor:
    """All that follows the resize but for the normalisation."""
    flip, jitter, *factors = params[:, :6].view(-1, 6, 1, 1, 1).unbind(dim=1)
    order = params[:, 6:10].view(-1, 4, 1, 1, 1).unbind(dim=1)
    grey, sigma, solarize = params[:, 10:].view(-1, 3, 1, 1, 1).unbind(dim=1)
    images = torch.where(flip > 0, images.flip(3), images)
    for chosen in order:
        for which, (adjust, factor) in enumerate(zip(ADJUSTMENTS, factors, strict=True)):
            images = torch.where((jitter > 0) & (chosen == which), adjust(images, factor), images)
    images = torch.where(grey > 0, luma(images), images)
    images = torch.where(sigma > 0, gaussian_blur(images, sigma.flatten(), kernel_size), images)
    return torch.where((solarize > 0) & (images >= 0.5), 1 - images, images)


def luma(images: Tensor) -> Tensor:  # [R, 3, H, W] -> [R, 1, H, W]
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = luma(images).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return (images * factor + mean.to(images.dtype) * (1 - factor)).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + luma(images) * (1 - factor)).clamp(0, 1)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    sector = torch.where(
        red == value,
        green - blue,
        torch.where(green == value, 2 * chroma + blue - red, 4 * chroma + red - green),
    )
    # In sixths of a turn. A grey pixel has none, and is left alone by the chroma of 0 below.
    hue = sector / torch.where(chroma == 0, 1.0, chroma) + 6 * factor
    # A channel is `value` within a sixth of a turn of its own hue, `value - chroma` within one of
    # the opposite hue, and linear in between.
    phase = (hue + hue.new_tensor((5.0, 3.0, 1.0)).view(3, 1, 1)).remainder(6)
    return value - chroma * torch.minimum(phase, 4 - phase).clamp(0, 1)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """By sigma [R] in pixels; where it is 0 the result is to be ignored."""
    R, C, H, W = images.shape
    radius = kernel_size // 2
    if R == 0:
        return images
    weights = gaussian(sigma, kernel_size).to(images.dtype).repeat_interleave(C, dim=0)
    planes = images[:, :, reflected(H, radius, images.device)]
    planes = planes[:, :, :, reflected(W, radius, images.device)]
    # Every channel of every view is a group of its own, with its own kernel.
    planes = planes.reshape(1, R * C, H + 2 * radius, W + 2 * radius)
    planes = nnF.conv2d(planes, weights[:, None, None, :], groups=R * C)
    return nnF.conv2d(planes, weights[:, None, :, None], groups=R * C).view(R, C, H, W)


def gaussian(sigma: Tensor, kernel_size: int) -> Tensor:  # [R] -> [R, kernel_size] float64
    radius = kernel_size // 2
    distances = torch.arange(-radius, radius + 1, dtype=torch.float64, device=sigma.device)
    sigma = torch.where(sigma > 0, sigma, 1.0).double().unsqueeze(1)
    weights = (-0.5 * (distances / sigma).square()).exp()
    return weights / weights.sum(dim=1, keepdim=True)


def reflected(length: int, radius: int, device: torch.device) -> Tensor:
    """[length + 2 * radius], where the pixels of a row come from once its ends are reflected."""
    # There and back again without repeating either end; one pixel is its own reflection.
    period = max(2 * (length - 1), 1)
    places = torch.arange(-radius, length + radius, device=device) % period
    return torch.minimum(places, period - places)
