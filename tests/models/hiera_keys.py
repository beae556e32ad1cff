"""transformers' names of Hiera tensors, turned into the official ones."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

RULES = [
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
]


def official(tensors: Mapping[str, Tensor], depths: Sequence[int]) -> dict[str, Tensor]:
    """`tensors` (parameters, or gradients by parameter name) under the official keys.

    transformers counts blocks within each of its stages, the official code throughout.
    """
    out = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        if match := re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)", name):
            stage, layer, rest = match.groups()
            name = f"blocks.{sum(depths[: int(stage)]) + int(layer)}.{rest}"
        out[name] = tensor
    return out
