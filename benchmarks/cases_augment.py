"""Views of images of 500 x 375 as SimCLR and DINO take them, from pixels and from JPEG files.

Beside the formulas in eager PyTorch: the crops by Pillow and the colours by batched PyTorch, as
`fastssl.data` makes views in a worker, and kornia, where it is installed. kornia draws its own
numbers and resizes without antialiasing, so that its views are others.
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

from benchmarks.registry import FORWARD, Case, Contender, forward_only
from fastssl import functional as F
from fastssl.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RandomResizedCrop, normalize
from fastssl.data.views import View

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
        return (files if jpeg else [_decode(file) for file in files]), uniforms

    def contenders(device: torch.device) -> dict[str, Contender]:
        open_all = (lambda files: [_decode(file) for file in files]) if jpeg else list
        found = {"eager": partial(_ours, views, "reference", device)}
        if device.type == "cpu":
            found["pillow"] = partial(_pillow, views)
        found["fastssl"] = partial(_ours, views, None, device)
        if importlib.util.find_spec("kornia") is not None:
            found["kornia"] = partial(_kornia, [_kornia_view(view) for view in views], device)

        def of(function: Callable) -> Contender:
            return forward_only(lambda images, uniforms: function(open_all(images), uniforms))

        return {name: of(function) for name, function in found.items()}

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


def _decode(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def _ours(
    views: list[View],
    backend: str | None,
    device: torch.device,
    images: list[Image.Image],
    uniforms: list[Tensor],
) -> tuple[Tensor, ...]:
    """Views of one size in one call, split afterwards."""
    arrays = [torch.from_numpy(np.array(image)) for image in images]
    lengths = torch.tensor([array.numel() for array in arrays])
    pixels = torch.cat([array.flatten() for array in arrays]).to(device)
    shapes = torch.tensor([array.shape[:2] for array in arrays])
    results: dict[int, Tensor] = {}
    for size in dict.fromkeys(view.size for view in views):
        numbers = [n for n, view in enumerate(views) if view.size == size]
        arguments = [_arguments(views[n], images, uniforms[n]) for n in numbers]
        boxes, params = zip(*arguments, strict=True)
        small = (lengths.cumsum(0) - lengths, shapes, torch.arange(len(images)).repeat(len(boxes)))
        out = F.augment_views(
            pixels,
            *(value.to(device) for value in (*small, torch.cat(boxes), torch.cat(params))),
            size=size,
            kernel_size=views[numbers[0]].kernel_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            backend=backend,
        )
        results |= zip(numbers, out.split(len(images)), strict=True)
    return tuple(results[n] for n in range(len(views)))


def _arguments(view: View, images: list[Image.Image], uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """`boxes` and `params` of a view, from the numbers that it is drawn with."""
    crop = RandomResizedCrop(view.size, view.scale, view.ratio, view.flip)
    rows = zip(images, uniforms.tolist(), strict=True)
    boxes = [crop.box((0, 0, *image.size), numbers) for image, numbers in rows]
    flip, jitter, factors, order, grey, blur, sigma, invert = uniforms[:, 4:].split(
        (1, 1, 4, 4, 1, 1, 1, 1), dim=1
    )
    spread = torch.tensor([view.brightness, view.contrast, view.saturation, view.hue])
    low = torch.cat([(1 - spread[:3]).clamp(min=0), -spread[3:]])
    high = torch.cat([1 + spread[:3], spread[3:]])
    sigma = view.sigma[0] + sigma * (view.sigma[1] - view.sigma[0])
    columns = (
        *(flip < view.flip, jitter < view.jitter, low + factors * (high - low)),
        *(order.argsort(dim=1, stable=True), grey < view.grey),
        *(torch.where(blur < view.blur, sigma, 0.0), invert < view.solarize),
    )
    return torch.tensor(boxes), torch.cat([column.float() for column in columns], dim=1)


def _pillow(
    views: list[View], images: list[Image.Image], uniforms: list[Tensor]
) -> tuple[Tensor, ...]:
    regions = [(0, 0, *image.size) for image in images]
    return tuple(
        normalize(view(images, regions, numbers), IMAGENET_MEAN, IMAGENET_STD)
        for view, numbers in zip(views, uniforms, strict=True)
    )


def _kornia_view(view: View) -> nn.Module:
    from kornia import augmentation as K

    side = view.kernel_size
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
    images: list[Image.Image],
    uniforms: list[Tensor],
) -> tuple[Tensor, ...]:
    arrays = np.stack([np.array(image) for image in images])
    batch = torch.from_numpy(arrays).to(device).permute(0, 3, 1, 2).float() / 255
    return tuple(view(batch) for view in views)
