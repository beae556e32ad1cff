"""Views of images of 500 x 375 as SimCLR and DINO take them, from pixels and from JPEG files.

Beside the formulas in eager PyTorch: Pillow with torch ops image by image, as torchvision has it,
and kornia, where it is installed. kornia draws its own numbers and resizes without antialiasing, so
that its views are others. JPEG files are each decoded once; by Pillow for the rivals.
"""

import importlib.util
import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.published_views import one_view
from benchmarks.registry import FORWARD, Case, Contender, forward_only
from fastssl import functional as F
from fastssl.data.decode import Pixels, decode_bytes
from fastssl.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from fastssl.data.views import View, decode_later, kernel_size, make_views

HEIGHT, WIDTH = 375, 500
SIMCLR_COLOR = {
    **{"jitter": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2},
    **{"grey": 0.2, "blur": 0.5},
}
DINO_COLOR = {"jitter": 0.8, "grey": 0.2}


def cases(quick: bool) -> list[Case]:
    batch, large, small = (2, 32, 16) if quick else (16, 224, 96)
    simclr = [View((large, large), (0.08, 1.0), **SIMCLR_COLOR, number=2)]
    dino = [
        View((large, large), (0.4, 1.0), **DINO_COLOR, blur=1.0),
        View((large, large), (0.4, 1.0), **DINO_COLOR, blur=0.1, solarize=0.2),
        View((small, small), (0.05, 0.4), **DINO_COLOR, blur=0.5, number=8),
    ]
    methods = {"simclr": simclr, "dino": dino}
    return [
        _case(f"augment_views/{name}{'_jpeg' if jpeg else ''}", batch, views, jpeg)
        for name, views in methods.items()
        for jpeg in (False, True)
    ]


def _case(name: str, batch: int, views: list[View], jpeg: bool) -> Case:
    views = [view for view in views for _ in range(view.number)]

    def make_inputs(device: torch.device) -> tuple:
        pictures = [_picture() for _ in range(batch)]
        files = [_encode(picture) for picture in pictures]
        uniforms = [
            F.keyed_uniform(torch.arange(batch), view.num_uniforms, seed=0, view=number)
            for number, view in enumerate(views)
        ]
        return (files if jpeg else [decode_bytes(file, "") for file in files]), uniforms

    def contenders(device: torch.device) -> dict[str, Contender]:
        fast = (lambda files: [decode_bytes(file, "") for file in files]) if jpeg else list
        found = {"eager": partial(_ours, views, fast, "reference", device)}
        if device.type == "cpu":
            found["pillow"] = partial(_pillow, views)
        found["fastssl"] = partial(_ours, views, fast, None, device)
        if importlib.util.find_spec("kornia") is not None:
            found["kornia"] = partial(_kornia, [_kornia_view(view) for view in views], device)
        return {name: forward_only(function) for name, function in found.items()}

    pixels = sum(view.size[0] * view.size[1] for view in views)
    sizes = [f"{view.size[0]}" for view in views]
    legend = " + ".join(f"{sizes.count(size)}x{size}" for size in dict.fromkeys(sizes))
    return Case(
        name=f"{name}/float32",
        shape=f"B={batch} {WIDTH}x{HEIGHT} -> {legend}",
        dtype="float32",
        direction=FORWARD,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios={base: (base, "fastssl") for base in ("eager", "pillow", "kornia")},
        # Pillow's way rounds the colours to 8 bits and may begin with the vertical pass.
        tolerance=5e-2,
        bytes_moved=batch * 3 * (HEIGHT * WIDTH + 4 * pixels),
        op="augment_views",
        images=batch,
        independent=("kornia",),
    )


def _picture() -> np.ndarray:
    """[HEIGHT, WIDTH, 3] uint8: slow colours and a little noise, as hard to decode as a photo."""
    coarse = 0.1 + 0.8 * torch.rand(1, 3, 12, 16)
    image = interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic")[0]
    image = image + 0.03 * torch.randn(3, HEIGHT, WIDTH)
    return (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()


def _encode(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=90)
    return file.getvalue()


def _opened(images: list) -> list[Image.Image]:
    """By Pillow, from files or pixels."""
    if isinstance(images[0], bytes):
        return [Image.open(io.BytesIO(file)).convert("RGB") for file in images]
    return [Image.fromarray(pixels) for pixels in images]


def _ours(
    views: list[View],
    decoded: Callable[[list], list[Pixels]],
    backend: str | None,
    device: torch.device,
    images: list,
    uniforms: list[Tensor],
) -> tuple[Tensor, ...]:
    batch = decode_later(views, decoded(images), uniforms).map(lambda tensor: tensor.to(device))
    return make_views(batch, mean=IMAGENET_MEAN, std=IMAGENET_STD, backend=backend)


def _pillow(views: list[View], images: list, uniforms: list[Tensor]) -> tuple[Tensor, ...]:
    opened = _opened(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    made = []
    for view, draws in zip(views, uniforms, strict=True):
        rows = zip(opened, draws.tolist(), view.params(draws).tolist(), strict=True)
        made.append(torch.stack([(one_view(i, view, n, p) - mean) / std for i, n, p in rows]))
    return tuple(made)


def _kornia_view(view: View) -> nn.Module:
    from kornia import augmentation as K

    side = kernel_size(view.size)
    factors = (view.brightness, view.contrast, view.saturation, view.hue)
    return nn.Sequential(
        K.RandomResizedCrop(view.size, view.scale, view.ratio),
        K.RandomHorizontalFlip(p=view.flip),
        K.ColorJitter(*factors, p=view.jitter),
        K.RandomGrayscale(p=view.grey),
        K.RandomGaussianBlur((side, side), view.sigma, p=view.blur),
        K.RandomSolarize(0.0, 0.0, p=view.solarize) if view.solarize else nn.Identity(),
        K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
    )


def _kornia(
    views: list[nn.Module],
    device: torch.device,
    images: list,
    uniforms: list[Tensor],
) -> tuple[Tensor, ...]:
    arrays = np.stack([np.array(image) for image in _opened(images)])
    batch = torch.from_numpy(arrays).to(device).permute(0, 3, 1, 2).float() / 255
    return tuple(view(batch) for view in views)
