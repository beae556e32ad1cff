"""Self-attention by whichever implementation is fast where it runs.

B images, N tokens, H heads, D = H * d channels.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import functional
from fastssl.kernels.common import dispatch, env, libraries

# torch's CUDA kernels put the batch into a grid dimension that ends here (pytorch #142228).
MAX_BATCH = 65_535
# Above this many keys the written-out scores take too much memory to be worth their speed.
MAX_EXPLICIT_KEYS = 1024
# Up to so many keys mask_unit_attention's kernels are taken where they won against torch's: on a
# CPU with pooling in every dtype, else by its kind; on a GPU (H100, torch 2.11) in general, when
# trained in half precision (76 keys of 72 and 96 channels were), and then with heads that won with
# 196 keys and more.
MAX_FUSED_KEYS = {"cpu": 256, "cuda": 64, "cuda training": 96, "cuda training, narrow": 256}
NARROW_HEADS = (32, 64)
# Measured on an Intel Xeon with AMX (tiles), and on an AMD EPYC with AVX-512 BF16 (dots), with and
# without the latter: in float32 torch's fused attention takes 1.3 to 1.8 times as long.
FUSED_DTYPES = {
    "tiles": (torch.bfloat16,),
    "dots": (torch.bfloat16, torch.float32),
    "avx512": (torch.float32,),
    "other": (),
}


@torch.compiler.assume_constant_result
def _cpu_kind() -> str:
    unit = libraries.bf16_unit()
    if unit != "none":
        return unit
    return "avx512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "other"


@torch.compiler.assume_constant_result
def _has_bf16_products() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _prefers_kernels(qkv: Tensor, num_heads: int, unit_size: int, q_stride: int) -> bool:
    kind = qkv.device.type
    if kind == "cuda" and _is_half(qkv) and torch.is_grad_enabled() and qkv.requires_grad:
        head_dim = qkv.shape[2] // (3 * num_heads)
        kind = "cuda training, narrow" if head_dim in NARROW_HEADS else "cuda training"
    if env.attention() is not None or unit_size > MAX_FUSED_KEYS.get(kind, 0):
        return False
    if kind != "cpu" or q_stride > 1:
        return True
    return qkv.dtype in FUSED_DTYPES[_cpu_kind()]


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def _prefers_scores(q: Tensor, num_keys: int) -> bool:
    """Whether scores are written out: on a CPU in half precision. In training the backward of
    torch's fused kernel takes 3 to 10 times as long (torch 2.13, 16 to 196 tokens); without
    gradients its forward takes twice as long where products in bfloat16 need no tiles."""
    if not _is_half(q) or q.device.type != "cpu" or num_keys > MAX_EXPLICIT_KEYS:
        return False
    if torch.is_grad_enabled() and q.requires_grad:
        return True
    return q.dtype == torch.bfloat16 and _cpu_kind() in ("dots", "avx512") and _has_bf16_products()


def self_attention(
    qkv: Tensor,  # [B, N, 3 * D], (q, k, v) outermost, heads next
    num_heads: int,
    *,
    unit_size: int | None = None,
    q_stride: int = 1,
) -> Tensor:  # [B, N / q_stride, D]
    """Attention within units of `unit_size` tokens, after pooling of the queries by `q_stride`.

    Arguments as `functional.mask_unit_attention`, whose kernels serve short units and sequences.
    Otherwise units are folded into the batch and `attend` is called. FASTSSL_ATTENTION names an
    implementation for everything: "torch", "flash_attn" or "xformers".
    """
    batch, num_tokens, _ = qkv.shape
    unit_size = unit_size or num_tokens
    if _prefers_kernels(qkv, num_heads, unit_size, q_stride):
        op = dispatch.OPS["mask_unit_attention"]
        if dispatch.choose_backend(op, None, qkv, num_heads, unit_size, q_stride) != "reference":
            return functional.mask_unit_attention(
                qkv, num_heads=num_heads, unit_size=unit_size, q_stride=q_stride
            )
    # [B * N / u, u, 3, H, d] -> three of [B * N / u, H, u, d]
    qkv = qkv.reshape(-1, unit_size, 3, num_heads, qkv.shape[2] // (3 * num_heads))
    q, k, v = qkv.transpose(1, 3).unbind(2)
    if q_stride > 1:
        q = q.unflatten(2, (q_stride, -1)).max(2).values
    out = attend(q, k, v)
    return out.transpose(1, 2).reshape(batch, num_tokens // q_stride, -1)


def attend(
    q: Tensor,  # [B, H, N, d]
    k: Tensor,  # [B, H, M, d]
    v: Tensor,  # [B, H, M, d]
) -> Tensor:  # [B, H, N, d]
    """softmax(q k^T / sqrt(d)) v, by torch's fused attention or what FASTSSL_ATTENTION names, or by
    scores that are written out, see `_prefers_scores`."""
    named = env.attention()
    if named in ("flash_attn", "xformers"):
        # Both take [B, N, H, d].
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _optional(named)(q, k, v).transpose(1, 2)
    if named is None and _prefers_scores(q, k.shape[2]):
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        return scores.softmax(dim=3) @ v
    if q.shape[0] > MAX_BATCH:
        parts = zip(q.split(MAX_BATCH), k.split(MAX_BATCH), v.split(MAX_BATCH), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
    return F.scaled_dot_product_attention(q, k, v)


def _optional(package: str):
    """The attention of a package that is never needed; ValueError where it is missing."""
    module, name = {
        "flash_attn": ("flash_attn", "flash_attn_func"),
        "xformers": ("xformers.ops", "memory_efficient_attention"),
    }[package]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"FASTSSL_ATTENTION={package} cannot be used: {error}") from error
