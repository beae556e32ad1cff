"""Normalisation layers by name, as files of configurations have them."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import nn

_EPS = 1e-6


def norm_layer_of(norm_layer: Any) -> Any:
    """A name in torch.nn, with eps 1e-6 or as in "LayerNorm:1e-5", as a constructor of norms; what
    is no string is returned as it is."""
    if not isinstance(norm_layer, str):
        return norm_layer
    name, _, eps = norm_layer.partition(":")
    try:
        kind = getattr(nn, name)
        inspect.signature(kind).bind(1, eps=float(eps or _EPS))
        return partial(kind, eps=float(eps or _EPS))
    except (AttributeError, ValueError, TypeError):
        raise ValueError(
            f"norm_layer must be a name in torch.nn, or as LayerNorm:1e-5, got {norm_layer!r}"
        ) from None


def name_of_norm(norm_layer: Any) -> Any:
    """What `norm_layer_of` understands, or `norm_layer` itself where it has no such name."""
    kind, keywords = norm_layer, {}
    if isinstance(norm_layer, partial) and not norm_layer.args:
        kind, keywords = norm_layer.func, norm_layer.keywords
    named = isinstance(kind, type) and getattr(nn, kind.__name__, None) is kind
    if not named or set(keywords) - {"eps"}:
        return norm_layer
    eps = keywords.get("eps", inspect.signature(kind).parameters["eps"].default)
    return kind.__name__ if eps == _EPS else f"{kind.__name__}:{eps}"
