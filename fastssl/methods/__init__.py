"""Methods of self-supervised pretraining: an encoder with its objective, as the loop trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastssl.data.views import View
from fastssl.methods.base import Method, Setting
from fastssl.methods.build import build_encoder, construct, find_method, make_views
from fastssl.methods.hiera_mae import HieraMAE
from fastssl.methods.mae import MAE
from fastssl.methods.simclr import SimCLR
from fastssl.models import load_pretrained

METHODS: dict[str, type[Method]] = {"mae": MAE, "hiera_mae": HieraMAE, "simclr": SimCLR}

__all__ = [
    "MAE",
    "METHODS",
    "HieraMAE",
    "Method",
    "Setting",
    "SimCLR",
    "build_encoder",
    "build_method",
    "make_views",
    "method_class",
]


def method_class(name: str) -> type[Method]:
    """The class of a method's name, or of `file.py:Class` or `package.module:Class`."""
    return find_method(name, METHODS)


def build_method(
    name: str,
    *,
    model: str,
    model_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    grad_checkpointing: bool = False,
    args: Mapping[str, Any] | None = None,
    image_size: int | Sequence[int] = 224,
    views: Sequence[View] | None = None,
    num_samples: int = 1,
    steps_per_epoch: int = 1,
    num_steps: int = 1,
    seed: int = 0,
) -> Method:
    """The method `name` around the encoder `model`: see `method_class` and `build_encoder`.

    Args:
        weights: file of released weights for the encoder.
        grad_checkpointing: whether the encoder keeps each block's input only.
        args: the method's keywords.
        image_size: the images' side or (height, width).
        views: see `Setting`, like the rest. None: the method's own.

    Raises:
        ValueError: a name, a keyword or a combination that does not exist.
    """
    method = method_class(name)
    encoder = build_encoder(
        model, {**method.model_args, **(model_args or {})}, image_size=image_size
    )
    if weights is not None:
        load_pretrained(encoder, weights)
    if grad_checkpointing:
        if not hasattr(encoder, "set_grad_checkpointing"):
            raise ValueError(f"train.grad_checkpointing: {model} has no blocks to checkpoint")
        encoder.set_grad_checkpointing()
    setting = Setting(
        encoder,
        make_views(method, image_size) if views is None else tuple(views),
        num_samples,
        steps_per_epoch,
        num_steps,
        seed,
    )
    return construct(method, name, setting, args or {})
