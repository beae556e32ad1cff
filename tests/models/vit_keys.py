"""transformers' names of ViT, ViTMAE and Dinov2 tensors, turned into the official ones."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

RULES = [
    (r"^vit\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^decoder\.decoder_layers\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"^(layers|encoder\.layer)\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.q_proj\.", ".attn.qkv."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj\.", ".mlp.w12."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
]


def official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` (parameters, or gradients by parameter name) under the official keys."""
    out = {}
    for name, tensor in tensors.items():
        if re.search(r"\.([kv]|up)_proj\.", name):
            continue
        if ".q_proj." in name:
            three = [tensors[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
            tensor = torch.cat(three)
        if ".gate_proj." in name:
            tensor = torch.cat([tensor, tensors[name.replace(".gate_proj.", ".up_proj.")]])
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    return out


def randomise(model: nn.Module) -> None:
    """Random numbers in every parameter, also in those that start at zero, one, or fixed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(std=0.1).add_(offset)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Norm of the difference at most `tolerance` times that of `expected`."""
    assert actual.shape == expected.shape, name
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"{name}: relative error {error:.2e}"
