"""Which parameters decay, and how fast each depth learns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

# blocks.3.norm1.weight, and blocks.0.3.norm1.weight where blocks come in chunks (dinov2).
_BLOCK = re.compile(r"(?:^|\.)blocks\.(?:\d+\.)?(\d+)\.")
_EMBEDDING = re.compile(
    r"(?:^|\.)(patch_embed\.|cls_token$|register_tokens$|backbone\.mask_token$|pos_embed)"
)
_OUTSIDE = re.compile(r"(?:^|\.)(decoder_|predictor\.)")
_LAST_LAYER = re.compile(r"(?:^|\.)last_layer\.")


def decays(name: str, parameter: Tensor) -> bool:
    """False for biases, norms and other vectors, tokens and position embeddings."""
    leaf = name.rsplit(".", 1)[-1]
    return parameter.ndim > 1 and leaf != "bias" and "token" not in leaf and "pos_embed" not in leaf


def layer_id(name: str, num_layers: int) -> int:
    """Depth by name: 0 embeddings, i + 1 encoder block i, num_layers + 1 whatever comes after."""
    if _OUTSIDE.search(name):
        return num_layers + 1
    if block := _BLOCK.search(name):
        return int(block[1]) + 1
    return 0 if _EMBEDDING.search(name) else num_layers + 1


def param_groups(
    module: nn.Module, *, layer_decay: float = 1.0, fixed_lr: Sequence[str] = ()
) -> list[dict]:
    """Groups for an optimizer, one per combination of decay, depth, last layer and fixed rate.

    Each group carries `decay` (bool), `lr_scale` (layer_decay ** distance from the output,
    Clark et al., 2020, arXiv:2003.10555), `last_layer` (bool: a module of that name) and
    `fixed_lr` (bool: in one of the modules that are named so), by which `set_hyperparameters`
    chooses from the scheduled values. Parameters without gradient are left out. Names are the
    official ones of ViT and Hiera, below any prefix.

    Raises:
        ValueError: nothing to train, or no parameter in a module of `fixed_lr`.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("module must have parameters that require a gradient, got none")
    depths = [
        int(m[1])
        for n, _ in named
        if not _OUTSIDE.search(n) and (m := _BLOCK.search(n)) is not None
    ]
    num_layers = max(depths, default=-1) + 1
    for fixed in fixed_lr:
        if not any(name.startswith(f"{fixed}.") for name, _ in named):
            raise ValueError(f"fixed_lr must name modules that learn, got {fixed!r}")
    groups: dict[tuple, dict] = {}
    for name, parameter in named:
        scale = layer_decay ** (num_layers + 1 - layer_id(name, num_layers))
        is_fixed = name.startswith(tuple(f"{fixed}." for fixed in fixed_lr))
        kind = {
            "decay": decays(name, parameter),
            "lr_scale": scale,
            "last_layer": bool(_LAST_LAYER.search(name)),
            "fixed_lr": is_fixed,
        }
        group = groups.setdefault(tuple(kind.values()), {"params": [], **kind})
        group["params"].append(parameter)
    return list(groups.values())
