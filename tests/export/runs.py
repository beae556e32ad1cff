"""Runs as `open_run` finds them, with random weights in place of trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastssl.export import TrainedRun
from fastssl.methods import build_method
from fastssl.training.config import load
from tests.models.vit_keys import randomise

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
HIERA = {"embed_dim": 8, "stages": [1, 2, 1], "q_pool": 2, "mask_unit_size": [4, 4]}
HIERA |= {"mask_unit_attn": [True, False, False]}


def random_run(
    method: str,
    model: str,
    model_args: dict[str, Any],
    image_size: tuple[int, int] = (32, 32),
    args: dict[str, Any] | None = None,
) -> TrainedRun:
    """The method with random numbers in every parameter, and a configuration that names it."""
    built = build_method(
        method, model=model, model_args=model_args, args=args, image_size=image_size
    )
    randomise(built)
    config = load("photos", [f"method.name={method}", f"model.name={model}"])
    config.model.args, config.method.args = model_args, args or {}
    config.views.image_size = list(image_size)
    return TrainedRun(Path("run"), config, built.eval(), image_size, {}, None, {})


def features_by_card(code: str, folder: Path, images: torch.Tensor) -> torch.Tensor:
    """What the code of a card makes of images."""
    names = {"images": images}
    with torch.no_grad():
        exec(code.replace("PATH_OF_THIS_FOLDER", str(folder)), names)
    return names["features"]
