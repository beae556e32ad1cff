"""The tensors of transformers' ViT, ViTMAE, Dinov2 and Hiera under our keys, and ours under theirs.

Their names on the disk are those of transformers 4, which version 5 reads and writes as well; in
memory version 5 has others. All are read here, those of the disk are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str]]

_SIGN = re.compile(r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$")

# (pattern of theirs, ours), one after the other.
_VIT: Rules = (
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"^(layers|encoder\.layer)\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.attention\.(q_proj|attention\.query)\.", ".attn.qkv."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.(gate_proj|weights_in)\.", ".mlp.w12."),
    (r"\.mlp\.(down_proj|weights_out)\.", ".mlp.w3."),
)
_HIERA: Rules = (
    (r"^hiera\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^pooler\.layernorm\.", "norm."),
    (r"^classifier\.", "head.projection."),
    (r"^multiscale_fusion\.", ""),
    (r"^decoder\.decoder_embeddings\.", "decoder_embed."),
    (r"^decoder\.decoder_position_embeddings$", "decoder_pos_embed"),
    (r"^decoder\.decoder_block\.layers\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
# Of a first part, theirs of the second and third: they keep one matrix as two or three.
_PARTS = {
    ".q_proj.": (".k_proj.", ".v_proj."),
    ".attention.query.": (".attention.key.", ".attention.value."),
    ".gate_proj.": (".up_proj.",),
}
_FURTHER = tuple(part for parts in _PARTS.values() for part in parts)
_STAGE = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)")

# (pattern of ours, theirs on the disk).
_TO_VIT: Rules = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^norm\.", "layernorm."),
    (r"^head\.", "classifier."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
)
# ViT and ViTMAE have names of their own for what Dinov2 calls as we do.
_TO_PLAIN_VIT: Rules = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_TO_HIERA: Rules = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^norm\.", "pooler.layernorm."),
    (r"^decoder_embed\.", "decoder.decoder_embeddings."),
    (r"^decoder_pos_embed$", "decoder.decoder_position_embeddings"),
    (r"^decoder_blocks\.", "decoder.decoder_block.layers."),
    (r"^(mask_token|decoder_norm\.|decoder_pred\.)", r"decoder.\1"),
    (r"^multi_scale_fusion_heads\.", "multiscale_fusion.multi_scale_fusion_heads."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
_OF_A_DECODER = ("decoder_", "mask_token")


def is_transformers(names: Mapping[str, Tensor]) -> bool:
    """Whether these are transformers' names of one of the four."""
    return any(_SIGN.search(name) for name in names)


def official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Theirs (parameters, or gradients by parameter name) under the official keys."""
    if any(_STAGE.search(name) for name in tensors):
        return _official_hiera(tensors)
    out = {}
    for name, tensor in tensors.items():
        if any(part in name for part in _FURTHER):
            continue
        for first, others in _PARTS.items():
            if first in name:
                names = [name.replace(first, other) for other in others]
                if missing := [other for other in names if other not in tensors]:
                    raise ValueError(f"beside {name} of transformers there is no {missing[0]}")
                tensor = torch.cat([tensor, *(tensors[other] for other in names)])
        out[_renamed(name, _VIT)] = tensor
    return out


def _official_hiera(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """They count blocks within each stage, the official code throughout."""
    places = [match.groups() for name in tensors if (match := _STAGE.search(name))]
    depths: dict[int, int] = {}
    for stage, layer, _ in places:
        depths[int(stage)] = max(depths.get(int(stage), 0), int(layer) + 1)
    out = {}
    for name, tensor in tensors.items():
        name = _renamed(name, _HIERA)
        if match := _STAGE.match(name):
            stage, layer, rest = match.groups()
            before = sum(depths[i] for i in range(int(stage)))
            name = f"blocks.{before + int(layer)}.{rest}"
        out[name] = tensor
    return out


def vit_names(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Ours of a VisionTransformer ("vit", "dinov2", "dinov2_with_registers") or, "vit_mae", of a
    MaskedAutoencoderViT, under theirs."""
    plain = not model_type.startswith("dinov2")
    rules = (*_TO_VIT, *(_TO_PLAIN_VIT if plain else ()))
    out = {}
    for name, tensor in tensors.items():
        if model_type == "vit_mae" and name.startswith(_OF_A_DECODER):
            theirs = re.sub(r"^decoder_blocks\.", "decoder_layers.", name)
            theirs = f"decoder.{_renamed(theirs, rules) if 'layers' in theirs else theirs}"
        else:
            theirs = _renamed(re.sub(r"^blocks\.", "encoder.layer.", name), rules)
            theirs = f"vit.{theirs}" if model_type == "vit_mae" else theirs
        if ".attn.qkv." not in name:
            out[theirs] = tensor
            continue
        for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            out[theirs.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
    return out


def hiera_names(tensors: Mapping[str, Tensor], depths: Sequence[int]) -> dict[str, Tensor]:
    """Ours of a Hiera or a MaskedAutoencoderHiera with these blocks in each stage, under theirs."""
    places = [(stage, layer) for stage, depth in enumerate(depths) for layer in range(depth)]
    within = "hiera." if "mask_token" in tensors else ""
    out = {}
    for name, tensor in tensors.items():
        theirs = _renamed(name, _TO_HIERA)
        if match := re.match(r"blocks\.(\d+)\.", theirs):
            stage, layer = places[int(match[1])]
            theirs = f"encoder.stages.{stage}.layers.{layer}.{theirs[match.end() :]}"
        encoder = name.startswith(("blocks.", "patch_embed.", "pos_embed"))
        out[within + theirs if encoder else theirs] = tensor
    return out


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
