"""Methods of self-supervised pretraining: a model with its objective, as the loop trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastssl import models
from fastssl.methods.base import Method
from fastssl.methods.hiera_mae import HieraMAE
from fastssl.methods.mae import MAE

METHODS: dict[str, type[Method]] = {"mae": MAE, "hiera_mae": HieraMAE}

__all__ = ["MAE", "METHODS", "HieraMAE", "Method", "build_method"]


def build_method(
    name: str,
    *,
    model: str,
    model_args: Mapping[str, Any] | None = None,
    image_size: int | Sequence[int] = 224,
    mask_ratio: float,
    seed: int = 0,
) -> Method:
    """The method `name` around the model `model` (a factory or class in fastssl.models).

    `model_args` are the model's keywords, which may be lists where it wants tuples; `image_size`
    is the images' side or (height, width). ValueError for names and keywords that do not exist.
    """
    if name not in METHODS:
        raise ValueError(f"method.name must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    return method(
        _build_model(method, model, model_args or {}, image_size), mask_ratio=mask_ratio, seed=seed
    )


def _build_model(
    method: type[Method], name: str, args: Mapping[str, Any], image_size: int | Sequence[int]
) -> nn.Module:
    if name not in method.model_names:
        names = ", ".join(method.model_names)
        raise ValueError(f"model.name must be one of {names} for this method, got {name!r}")
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    kwargs = {method.size_argument: sides * (2 // len(sides))}
    kwargs |= {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    try:
        return getattr(models, name)(**kwargs)
    except TypeError as error:
        raise ValueError(f"model.args do not fit {name}: {error}") from error
