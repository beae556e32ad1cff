"""transformers' configurations of ViT, ViTMAE, Dinov2 and Hiera, and the arguments of our models.

`configuration(model)` is what a config.json of theirs says of a model of ours, `arguments(config,
cls)` the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from fastssl.nn.block import LayerScale
from fastssl.nn.swiglu import SwiGLU

Config = dict[str, Any]

# What each of their model types can be here; the first is nearest.
_CLASSES = {
    "vit": ("VisionTransformer",),
    "dinov2": ("VisionTransformer",),
    "dinov2_with_registers": ("VisionTransformer",),
    "vit_mae": ("MaskedAutoencoderViT", "VisionTransformer"),
    "hiera": ("MaskedAutoencoderHiera", "Hiera"),
}
# Their classes for what is written here.
ARCHITECTURES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit_mae": "ViTMAEForPreTraining",
}
# Whose features are the class token's unless "fastssl_global_pool" of config.json says otherwise.
POOLED = ("vit", "dinov2", "dinov2_with_registers")


def configuration(model: nn.Module) -> Config:
    """Their config.json of a VisionTransformer, MaskedAutoencoderViT, Hiera or
    MaskedAutoencoderHiera.

    Raises ValueError, with the reason, for a model that transformers has no place for.
    """
    kinds = [base.__name__ for base in type(model).__mro__]
    for name, build in _BUILDERS.items():
        if name in kinds:
            config = build(model)
            return {"dtype": str(next(model.parameters()).dtype).partition(".")[2], **config}
    raise _no_place(f"a {type(model).__name__}, only for {', '.join(_BUILDERS)}")


def arguments(config: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The keywords of `cls`, one of the four, for a config.json of theirs.

    Raises ValueError where the configuration is of another model, or of what `cls` cannot do.
    """
    kind = config["model_type"]
    names = [base.__name__ for base in cls.__mro__]
    name = next((n for n in names if n in _BUILDERS), cls.__name__)
    fitting = _CLASSES.get(kind, ())
    if name not in fitting:
        can = f"a {' or a '.join(fitting)}" if fitting else "not known here"
        raise ValueError(f"config.json is of transformers' {kind!r}, {can}, got {cls.__name__}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act must be gelu for fastssl, got {config['hidden_act']!r}")
    if kind == "hiera":
        return _hiera_arguments(config, name)
    return _vit_arguments(config, name)


def _no_place(what: str) -> ValueError:
    return ValueError(f"transformers has no place for {what}")


def _size(sides: tuple[int, ...]) -> int | list[int]:
    return sides[0] if len(set(sides)) == 1 else list(sides)


def _eps(norm: nn.Module) -> float:
    if type(norm) is not nn.LayerNorm:
        raise _no_place(f"norms of another kind than LayerNorm, got {type(norm).__name__}")
    return norm.eps


def _of_encoder(model: nn.Module) -> Config:
    """What ViT, ViTMAE and Dinov2 call alike."""
    block = model.blocks[0]
    patch = model.patch_size
    size = tuple(n * p for n, p in zip(model.grid_size, patch, strict=True))
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": _eps(model.norm),
        "image_size": _size(size),
        "patch_size": _size(patch),
        "num_channels": model.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def _vision_transformer(model: nn.Module) -> Config:
    block = model.blocks[0]
    config = _of_encoder(model)
    num_registers = model.num_prefix_tokens - 1
    scaled, gated = isinstance(block.ls1, LayerScale), isinstance(block.mlp, SwiGLU)
    if not (scaled or gated or num_registers):
        kind, hidden = "vit", block.mlp.fc1.out_features
        return _typed(kind, config | {"intermediate_size": hidden})
    if isinstance(config["image_size"], list):
        raise _no_place(f"positions of a Dinov2 that is not square, got {config['image_size']}")
    ratio = model.arguments["mlp_ratio"]
    if ratio != int(ratio):
        raise _no_place(f"a Dinov2 whose mlp_ratio is no whole number, got {ratio}")
    config |= {
        "mlp_ratio": int(ratio),
        "use_swiglu_ffn": gated,
        "layerscale_value": block.ls1.init_values if scaled else 1.0,
    }
    if num_registers:
        return _typed("dinov2_with_registers", config | {"num_register_tokens": num_registers})
    return _typed("dinov2", config)


def _typed(kind: str, config: Config) -> Config:
    return {"model_type": kind, "architectures": [ARCHITECTURES[kind]], **config}


def _masked_autoencoder_vit(model: nn.Module) -> Config:
    if model.mask_in_encoder:
        raise _no_place("a ViTMAE that was built with mask_in_encoder")
    if len(set(model.grid_size)) > 1:
        raise _no_place(f"a ViTMAE that is not square, got {model.grid_size} patches")
    num_pixels = math.prod(model.patch_size) * model.patch_embed.proj.in_channels
    if model.decoder_pred.out_features != num_pixels:
        raise _no_place("a ViTMAE that predicts something else than pixels")
    decoder = model.decoder_blocks[0]
    return _typed(
        "vit_mae",
        _of_encoder(model)
        | {
            "intermediate_size": model.blocks[0].mlp.fc1.out_features,
            "decoder_hidden_size": model.decoder_embed.out_features,
            "decoder_num_hidden_layers": len(model.decoder_blocks),
            "decoder_num_attention_heads": decoder.attn.num_heads,
            "decoder_intermediate_size": decoder.mlp.fc1.out_features,
            "norm_pix_loss": model.norm_pix_loss,
        },
    )


def _hiera(model: nn.Module) -> Config:
    proj, layout = model.patch_embed.proj, model.layouts[0]
    if len(proj.stride) != 2:
        raise _no_place("a Hiera for clips")
    heads = [model.blocks[end].attn.heads for end in model.stage_ends]
    depths = [b - a for a, b in pairwise([-1, *model.stage_ends])]
    size = [n * s for n, s in zip(model.tokens_spatial_shape, proj.stride, strict=True)]
    # Theirs are contiguous only where a pooling behind every stage would leave one token of a unit.
    unit = tuple(q ** (len(depths) - 1) for q in layout.q_stride)
    if layout.shape != unit:
        raise _no_place(
            f"a Hiera of {len(depths)} stages with mask units other than {unit}, got {layout.shape}"
        )
    decoder = getattr(model, "decoder_blocks", None)
    config = {
        "model_type": "hiera",
        "architectures": ["HieraModel" if decoder is None else "HieraForPreTraining"],
        "embed_dim": model.embed_dim,
        "image_size": size,
        "patch_size": list(proj.kernel_size),
        "patch_stride": list(proj.stride),
        "patch_padding": list(proj.padding),
        "mlp_ratio": float(model.arguments["mlp_ratio"]),
        "depths": depths,
        "num_heads": heads,
        "embed_dim_multiplier": float(model.arguments["dim_mul"]),
        "num_query_pool": model.q_pool,
        "query_stride": list(layout.q_stride),
        "masked_unit_size": list(layout.shape),
        "masked_unit_attention": list(model.arguments["mask_unit_attn"])[: len(depths)],
        "num_channels": proj.in_channels,
        "hidden_act": "gelu",
        "layer_norm_eps": _eps(model.norm if decoder is None else model.encoder_norm),
    }
    if decoder is None:
        return config
    return config | {
        "decoder_hidden_size": model.decoder_embed.out_features,
        "decoder_depth": len(decoder),
        "decoder_num_heads": decoder[0].attn.heads,
        "normalize_pixel_loss": model.norm_pix_loss,
    }


_BUILDERS: dict[str, Callable[[nn.Module], Config]] = {
    "MaskedAutoencoderHiera": _hiera,
    "Hiera": _hiera,
    "MaskedAutoencoderViT": _masked_autoencoder_vit,
    "VisionTransformer": _vision_transformer,
}


def _vit_arguments(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind, width = config["model_type"], config.get("hidden_size", 768)
    is_dinov2 = kind.startswith("dinov2")
    if is_dinov2:
        ratio = config.get("mlp_ratio", 4)
    else:
        hidden = config.get("intermediate_size", 3072)
        ratio = hidden / width
        if int(width * ratio) != hidden:
            ratio = (hidden + 0.5) / width  # rounded down, it is the width again
    eps = config.get("layer_norm_eps", 1e-6 if is_dinov2 else 1e-12)
    found = {
        "img_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", 14 if kind == "dinov2" else 16),
        "in_chans": config.get("num_channels", 3),
        "embed_dim": width,
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "mlp_ratio": ratio,
        "norm_layer": f"LayerNorm:{eps}",
    }
    if name == "MaskedAutoencoderViT":
        if not config.get("qkv_bias", True):
            raise ValueError("qkv_bias must be true for a MaskedAutoencoderViT, got false")
        return found | {
            "decoder_embed_dim": config.get("decoder_hidden_size", 512),
            "decoder_depth": config.get("decoder_num_hidden_layers", 8),
            "decoder_num_heads": config.get("decoder_num_attention_heads", 16),
            "norm_pix_loss": config.get("norm_pix_loss", False),
        }
    found["qkv_bias"] = config.get("qkv_bias", True)
    # Of a masked autoencoder the mean of the patches is what is judged.
    found["global_pool"] = config.get(
        "fastssl_global_pool", "avg" if kind == "vit_mae" else "token"
    )
    if is_dinov2:
        registers = config.get("num_register_tokens", 4) if kind != "dinov2" else 0
        found |= {
            "init_values": config.get("layerscale_value", 1.0),
            "num_register_tokens": registers,
            "interpolate_antialias": bool(registers),
            "use_mask_token": config.get("use_mask_token", True),
            "ffn_layer": "swiglu" if config.get("use_swiglu_ffn", False) else "mlp",
        }
    return found


def _hiera_arguments(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    heads = config.get("num_heads", [1, 2, 4, 8])
    head_mul = heads[1] / heads[0] if len(heads) > 1 else 1
    if any(b != a * head_mul for a, b in pairwise(heads)):
        raise ValueError(f"num_heads must grow by one factor for fastssl, got {heads}")
    found = {
        "input_size": config.get("image_size", [224, 224]),
        "in_chans": config.get("num_channels", 3),
        "embed_dim": config.get("embed_dim", 96),
        "num_heads": heads[0],
        "stages": config.get("depths", [2, 3, 16, 3]),
        "q_pool": config.get("num_query_pool", 3),
        "q_stride": config.get("query_stride", [2, 2]),
        "mask_unit_size": config.get("masked_unit_size", [8, 8]),
        "mask_unit_attn": config.get("masked_unit_attention", [True, True, False, False]),
        "dim_mul": config.get("embed_dim_multiplier", 2.0),
        "head_mul": head_mul,
        "patch_kernel": config.get("patch_size", [7, 7]),
        "patch_stride": config.get("patch_stride", [4, 4]),
        "patch_padding": config.get("patch_padding", [3, 3]),
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "norm_layer": f"LayerNorm:{config.get('layer_norm_eps', 1e-6)}",
        "num_classes": 0,
    }
    if name == "Hiera":
        return found
    decoder = {
        "decoder_embed_dim": config.get("decoder_hidden_size"),
        "decoder_depth": config.get("decoder_depth"),
        "decoder_num_heads": config.get("decoder_num_heads"),
    }
    missing = [key for key, value in decoder.items() if value is None]
    if missing:
        raise ValueError("config.json must describe a decoder for a MaskedAutoencoderHiera")
    return found | decoder | {"norm_pix_loss": config.get("normalize_pixel_loss", True)}
