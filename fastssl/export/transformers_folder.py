"""A folder that `from_pretrained` of transformers loads, written without that package."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.export.card import Usage
from fastssl.export.run import TrainedRun, backbone
from fastssl.models import MaskedAutoencoderViT
from fastssl.models.hub import CONFIG, WEIGHTS, save_tensors
from fastssl.models.transformers_config import POOLED, configuration
from fastssl.models.transformers_keys import hiera_names, vit_names


def write_transformers(run: TrainedRun, folder: Path) -> Usage:
    """Write config.json and model.safetensors: of a MaskedAutoencoderViT a ViTMAE, of a
    VisionTransformer a ViT, or with LayerScale, registers or gates a Dinov2, of a Hiera a Hiera.

    ValueError, with the reason, for a model that transformers has no place for.
    """
    model, notes = run.model, []
    try:
        config = configuration(model)
    except ValueError as error:
        if not isinstance(model, MaskedAutoencoderViT):
            raise
        # What its decoder predicts is not ViTMAE's; the encoder is a ViT all the same.
        model = backbone(run)
        config, notes = configuration(model), [f"The decoder was left out: {error}."]
    if (ratio := run.config.method.args.get("mask_ratio")) and "Pre" in config["architectures"][0]:
        config["mask_ratio"] = ratio
    averages = run.averages_patches or getattr(model, "global_pool", "token") == "avg"
    if averages and config["model_type"] in POOLED:
        # Theirs do not pool; `from_pretrained` of fastssl does.
        config["fastssl_global_pool"] = "avg"
    code, more = _usage(config, averages)
    save_tensors(folder / WEIGHTS, _tensors(model, config))
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
    return Usage("transformers", code, notes + more)


def _tensors(model: nn.Module, config: dict) -> dict[str, Tensor]:
    """The state dict under transformers' names, with what Dinov2 cannot be without."""
    # A classifier is no part of what was pretrained.
    state = {k: t for k, t in model.state_dict().items() if not k.startswith("head.")}
    kind = config["model_type"]
    if kind == "hiera":
        return hiera_names(state, config["depths"])
    if kind == "vit":
        # ViTModel has no place for it, and features do not depend on it.
        state.pop("mask_token", None)
    if kind.startswith("dinov2"):
        width = config["hidden_size"]
        state.setdefault("mask_token", torch.zeros(1, width))
        for block in range(config["num_hidden_layers"]):
            for branch in ("ls1", "ls2"):
                state.setdefault(f"blocks.{block}.{branch}.gamma", torch.ones(width))
    return vit_names(state, kind)


def _usage(config: dict, averages_patches: bool) -> tuple[str, list[str]]:
    """Code that makes features, and notes."""
    kind, notes = config["model_type"], []
    options = ""
    if kind == "vit_mae":
        name, options = "ViTMAEModel", ", mask_ratio=0.0"
        notes = ["ViTMAEForPreTraining loads the decoder as well."]
    elif config["architectures"] == ["HieraForPreTraining"]:
        code = """
from transformers import HieraForPreTraining

model = HieraForPreTraining.from_pretrained("PATH_OF_THIS_FOLDER")
loss = model(images).loss
"""
        notes = [
            "The run's features are the mean of the encoder's fused and normed tokens; fastssl's "
            'MaskedAutoencoderHiera.from_pretrained("PATH_OF_THIS_FOLDER").features(images) gives '
            "them."
        ]
        return code, notes
    elif kind == "hiera":
        name = "HieraModel"
    else:
        name = config["architectures"][0]
        # A pooler is no part of what was pretrained.
        options = ", add_pooling_layer=False" if kind == "vit" else ""
    prefix = 1 + config.get("num_register_tokens", 0)
    if kind == "hiera":
        features = "pooler_output"
    elif averages_patches:
        features = f"last_hidden_state[:, {prefix}:].mean(1)"
    else:
        features = "last_hidden_state[:, 0]"
    code = f"""
from transformers import {name}

model = {name}.from_pretrained("PATH_OF_THIS_FOLDER"{options}).eval()
features = model(images).{features}  # [B, D]
"""
    return code, notes
