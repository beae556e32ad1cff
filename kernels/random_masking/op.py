"""The public op fastssl::random_masking: checks, backends, fake implementation."""

import torch
from torch import Tensor

from fastssl.kernels.common import dispatch
from fastssl.kernels.common.checks import check_int, check_tensor
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.random_masking import reference


def _example(device: torch.device) -> tuple:
    return (torch.zeros(2, 5, device=device),)


# Above this the comparisons, whose number grows with N^2, cost more than torch's sort.
MAX_TRITON_TOKENS = 4096
# Smaller batches of tokens are not worth a second thread.
_TOKENS_PER_TASK = 8192


def _cannot_run_triton(noise: Tensor) -> str | None:
    if noise.shape[1] > MAX_TRITON_TOKENS:
        return f"N = {noise.shape[1]} is above {MAX_TRITON_TOKENS}, where torch's sort is faster"
    return dispatch.cannot_run_triton(noise)


OP = dispatch.register(
    "random_masking",
    {"triton": _cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def random_masking(
    noise: Tensor,  # [B, N]
    len_keep: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep int32 [B, len_keep], ids_restore int32 [B, N], mask float32 [B, N].

    Keeps the len_keep tokens of least noise, ties by index and NaN last, as a stable argsort does;
    mask is 1 where a token is removed (He et al. 2021, arXiv 2111.06377). Not differentiable.
    """
    check_tensor("noise", noise, dim=2)
    check_int("len_keep", len_keep, 0, noise.shape[1])
    noise = noise.detach()
    name = dispatch.choose_backend(OP, backend, noise)
    if name == "reference":
        return reference.random_masking(noise, len_keep)
    return torch.ops.fastssl.random_masking(noise.contiguous(), len_keep, name)


@custom_op("fastssl::random_masking")
def _random_masking(noise: Tensor, len_keep: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return reference.random_masking(noise, len_keep)
    outputs = _random_masking_fake(noise, len_keep, backend)
    if backend == "cpp":
        batch, num_tokens = noise.shape
        tasks = min(batch, torch.get_num_threads(), 1 + noise.numel() // _TOKENS_PER_TASK)
        scratch = noise.new_empty((tasks, 2, num_tokens), dtype=torch.int64)
        torch.ops.fastssl_csrc.random_masking(noise, scratch, *outputs)
    else:
        from fastssl.kernels.random_masking import triton_kernel

        triton_kernel.random_masking(noise, *outputs)
    return outputs


@_random_masking.register_fake
def _random_masking_fake(noise, len_keep, backend):
    ids_keep = noise.new_empty((noise.shape[0], len_keep), dtype=torch.int32)
    ids_restore = torch.empty_like(noise, dtype=torch.int32)
    return ids_keep, ids_restore, torch.empty_like(noise, dtype=torch.float32)


counts_no_flops(torch.ops.fastssl.random_masking)
