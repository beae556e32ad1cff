"""Images or clips per second of each model, forward and training step, as papers table them.

Ours alone, in bf16 autocast on whatever device is there: inference of the encoder on all tokens,
and one step of its masked autoencoder with the fused AdamW.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases_steps import (
    adamw,
    count_flops,
    pretraining,
    training_step,
    with_graph,
)
from benchmarks.registry import FORWARD, STEP, Case, Contender
from fastssl import models

# name: (encoder, its masked autoencoder, size of an input, mask units or patches, batch)
IMAGE, CLIP = (3, 224, 224), (3, 16, 224, 224)
MODELS = {
    "vit_small": ("vit_small", None, IMAGE, 196, 8),
    "vit_base": ("vit_base", "mae_vit_base_patch16", IMAGE, 196, 8),
    "vit_large": ("vit_large", "mae_vit_large_patch16", IMAGE, 196, 8),
    "hiera_tiny": ("HieraT", "mae_hiera_tiny_224", IMAGE, 49, 8),
    "hiera_small": ("HieraS", "mae_hiera_small_224", IMAGE, 49, 8),
    "hiera_base": ("HieraB", "mae_hiera_base_224", IMAGE, 49, 8),
    "hiera_base_plus": ("HieraBPlus", "mae_hiera_base_plus_224", IMAGE, 49, 8),
    "hiera_large": ("HieraL", "mae_hiera_large_224", IMAGE, 49, 8),
    "hiera_huge": ("HieraH", "mae_hiera_huge_224", IMAGE, 49, 4),
    "hiera_base_16x224": ("hiera_base_16x224", "mae_hiera_base_16x224", CLIP, 392, 1),
    "hiera_large_16x224": ("hiera_large_16x224", "mae_hiera_large_16x224", CLIP, 392, 1),
}
QUICK = {
    "hiera_tiny": ("HieraT", "mae_hiera_tiny_224", (3, 64, 64), 4, 2),
}
# What makes a model small enough to show that everything runs.
QUICK_ARGUMENTS = {"input_size": (64, 64), "stages": (1, 1, 1, 1), "embed_dim": 16}


def cases(quick: bool, scale: int) -> list[Case]:
    made = []
    for name, (encoder, autoencoder, size, units, batch) in (QUICK if quick else MODELS).items():
        arguments, batch = QUICK_ARGUMENTS if quick else {}, scale * batch
        made.append(_case(name, encoder, arguments, size, units, batch, FORWARD))
        if autoencoder is not None:
            made.append(_case(name, autoencoder, arguments, size, units, batch, STEP))
    return made


def _case(
    name: str,
    factory: str,
    arguments: dict,
    size: tuple[int, ...],
    units: int,
    batch: int,
    direction: str,
) -> Case:
    def make_inputs(device: torch.device) -> tuple:
        return torch.randn(batch, *size, device=device), torch.rand(batch, units, device=device)

    def contenders(device: torch.device) -> dict[str, Contender]:
        with device:
            model = getattr(models, factory)(**arguments)
        if direction == FORWARD:
            return with_graph({"fastssl": _features(model.eval())}, device)
        ratio = {"mask_ratio": 0.9} if len(size) == 4 else {}
        step = training_step(model.train(), partial(pretraining(model), **ratio), adamw(model))
        return with_graph({"fastssl": step}, device)

    shape = "x".join(map(str, size[1:]))
    return Case(
        name=f"throughput/{name}/{direction}",
        shape=f"B={batch} {shape}",
        dtype="bfloat16",
        direction=direction,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios={},
        tolerance=1e-3,
        flops=count_flops,
        images=batch,
    )


def _features(model: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    def call(images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            return (model.features(images),)

    return call
