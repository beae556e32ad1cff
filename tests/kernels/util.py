"""What every kernel test shares: the backends at hand, devices and the error rule.

The rule: a kernel's error against float64 truth is at most twice that of the eager formula in the
same dtype, plus an absolute allowance per dtype.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastssl.kernels.common import libraries
from fastssl.kernels.common.dispatch import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter cuts float32 to bfloat16 instead of rounding, which costs half a unit in the
# last place; compiled kernels round.
BF16_ATOL = 1e-3 if torch.cuda.is_available() else 2**-8
ATOL = {torch.float32: 1e-6, torch.bfloat16: BF16_ATOL, torch.float16: 1e-4}


def compiled_backends(op: str) -> list:
    """Every backend of `op` but the reference, as parameters; triton and cuda count as gpu tests
    on a machine with a GPU, cpp never does."""
    params = []
    for name in OPS[op].backends:
        if name == "reference" or (name == "cuda" and libraries.why_no_cuda_library()):
            continue
        on_gpu = torch.cuda.is_available() and name != "cpp"
        params.append(pytest.param(name, marks=[pytest.mark.gpu] if on_gpu else []))
    return params


def backends_on_ranks(op: str) -> list[str]:
    """Those that run in gloo_pool's workers, which are on the CPU and interpret Triton."""
    return [name for name in OPS[op].backends if name != "cuda"]


def device_of(backend: str) -> torch.device:
    return torch.device("cpu") if backend == "cpp" else DEVICE


def gradients(
    function: Callable[..., Tensor], inputs: Sequence, grad_output: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The output of `function` and the gradients of every floating-point tensor among `inputs`."""
    leaves = [
        value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in inputs
    ]
    output = function(*leaves)
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return output, list(torch.autograd.grad(output, wanted, grad_output.to(output.dtype)))


def to_double(value: object) -> object:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def assert_close_to_truth(
    name: str, actual: Tensor, eager: Tensor, truth: Tensor, atol: float | None = None
) -> None:
    """|actual - truth| <= 2 max|eager - truth| + atol * max(1, max|truth|), and all finite."""
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite (unwritten memory?)"
    error = (actual.double() - truth).abs().max().item()
    eager_error = (eager.double() - truth).abs().max().item()
    atol = ATOL[actual.dtype] if atol is None else atol
    bound = 2 * eager_error + atol * max(1.0, truth.abs().max().item())
    assert error <= bound, f"{name}: error {error:.3e}, eager {eager_error:.3e}, bound {bound:.3e}"
