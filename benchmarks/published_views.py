"""Views one image at a time, as torchvision publishes them: Pillow's crop, then tensors.

The numbers are those of `fastssl.data.views`, so that both ways make the same views.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as nnF

from fastssl.data.views import View, kernel_size


def one_view(image: Image.Image, view: View, numbers: list[float], params: list[float]) -> Tensor:
    """[3, H, W] float32 in [0, 1], by a row of the view's numbers and what they say."""
    crop = image.crop(view.box((0, 0, *image.size), numbers))
    crop = crop.resize((view.size[1], view.size[0]), Image.Resampling.BICUBIC)
    flip, jitter, *rest = params
    factors, order, (grey, sigma, invert) = rest[:4], rest[4:8], rest[8:]
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float().div_(255)
    if jitter:
        for which in map(int, order):
            x = ADJUSTMENTS[which](x, factors[which])
    if grey:
        x = _luma(x).expand(3, -1, -1)
    if sigma:
        x = _blurred(x, sigma, kernel_size(view.size))
    return torch.where(x >= 0.5, 1 - x, x) if invert else x


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(0)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(0)


def _blend(x: Tensor, other: Tensor | float, factor: float) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _turned(x: Tensor, shift: float) -> Tensor:
    """To HSV and back by its six sectors."""
    red, green, _ = x.unbind(0)
    high, low = x.amax(0), x.amin(0)
    chroma = high - low
    saturation = chroma / torch.where(high == 0, 1.0, high)
    to_red, to_green, to_blue = ((high - x) / torch.where(chroma == 0, 1.0, chroma)).unbind(0)
    hue = torch.where(high == green, 2 + to_red - to_blue, 4 + to_green - to_red)
    hue = torch.where(high == red, to_blue - to_green, hue)
    hue = (hue / 6 + 1 + shift) % 1
    sector = (hue * 6).floor()
    f = hue * 6 - sector
    p = (high * (1 - saturation)).clamp(0, 1)
    q = (high * (1 - saturation * f)).clamp(0, 1)
    t = (high * (1 - saturation * (1 - f))).clamp(0, 1)
    chosen = (sector.long() % 6).unsqueeze(0) == torch.arange(6).view(-1, 1, 1)
    table = [(high, q, p, p, t, high), (t, high, high, q, p, p), (p, p, t, high, high, q)]
    values = torch.stack([torch.stack(channel) for channel in table])
    return torch.einsum("ihw,cihw->chw", chosen.to(x.dtype), values)


def _blurred(x: Tensor, sigma: float, size: int) -> Tensor:
    places = torch.linspace(-(size // 2), size // 2, size)
    weights = torch.exp(-0.5 * (places / sigma).square())
    weights = weights / weights.sum()
    kernel = torch.outer(weights, weights).expand(3, 1, -1, -1)
    padded = nnF.pad(x.unsqueeze(0), [size // 2] * 4, mode="reflect")
    return nnF.conv2d(padded, kernel, groups=3)[0]


# By their numbers in augment_views' columns first .. fourth.
ADJUSTMENTS = (
    lambda x, factor: (factor * x).clamp(0, 1),
    lambda x, factor: _blend(x, _luma(x).mean(), factor),
    lambda x, factor: _blend(x, _luma(x), factor),
    _turned,
)
