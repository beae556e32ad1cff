"""The public op fastssl::keyed_uniform: checks, backends, fake implementation."""

import torch
from torch import Tensor

from fastssl.kernels.common import dispatch
from fastssl.kernels.common.checks import check_int, check_tensor
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.common.philox import derive_key
from fastssl.kernels.keyed_uniform import reference


def _example(device: torch.device) -> tuple:
    return (torch.arange(2, device=device),)


OP = dispatch.register(
    "keyed_uniform",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def keyed_uniform(
    samples: Tensor,  # [B] int64
    num: int,
    *,
    seed: int,
    epoch: int = 0,
    view: int = 0,
    stream: int = 0,
    backend: str | None = None,
) -> Tensor:  # [B, num] float32 in [0, 1)
    """Uniform numbers that are a function of (seed, epoch, sample, view, stream) and the position.

    samples: ids in [0, 2^63), one per row. seed lies in [0, 2^63); epoch, view and stream are ints
    in [0, 2^32), one for the whole call: rows of another epoch or view are another call. The bits
    are the same on every backend. Philox4x32-10 (Salmon et al., SC 2011).
    """
    check_tensor("samples", samples, dim=1, dtypes=(torch.int64,))
    check_int("num", num, 0)
    check_int("seed", seed, 0, 2**63 - 1)
    check_int("epoch", epoch, 0, 2**32 - 1)
    check_int("view", view, 0, 2**32 - 1)
    check_int("stream", stream, 0, 2**32 - 1)
    name = dispatch.choose_backend(OP, backend, samples)
    # Inductor repeats what two later rounds read in both, which doubles the code ten times over, so
    # that even the reference stays an op of its own in a compiled graph.
    opaque = torch.compiler.is_compiling() and not dispatch.is_exporting()
    if name == "reference" and not opaque:
        return reference.keyed_uniform(samples, num, seed, epoch, view, stream)
    return torch.ops.fastssl.keyed_uniform(
        samples.contiguous(), num, seed, epoch, view, stream, name
    )


@custom_op("fastssl::keyed_uniform")
def _keyed_uniform(
    samples: Tensor, num: int, seed: int, epoch: int, view: int, stream: int, backend: str
) -> Tensor:
    if backend == "reference":
        return reference.keyed_uniform(samples, num, seed, epoch, view, stream)
    out = _keyed_uniform_fake(samples, num, seed, epoch, view, stream, backend)
    key = derive_key(seed, epoch, view, stream)
    if backend == "cpp":
        torch.ops.fastssl_csrc.keyed_uniform(samples, *key, out)
    else:
        from fastssl.kernels.keyed_uniform import triton_kernel

        triton_kernel.keyed_uniform(samples, key, out)
    return out


@_keyed_uniform.register_fake
def _keyed_uniform_fake(samples, num, seed, epoch, view, stream, backend):
    return samples.new_empty((samples.shape[0], num), dtype=torch.float32)


counts_no_flops(torch.ops.fastssl.keyed_uniform)
