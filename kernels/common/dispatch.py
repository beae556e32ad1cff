"""Which backend runs an op, and why not the others."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.kernels.common import env, libraries

logger = logging.getLogger("fastssl")

Reason = Callable[..., str | None]


def never(*args: object) -> None:
    """The reference backend runs everywhere."""


@dataclass(frozen=True)
class Op:
    """A public op: its backends from the most wanted to the last resort, and an example call.

    `backends` maps a name to a function of the op's arguments that returns None where the backend
    can run and the reason in words where it cannot. `example(device)` returns such arguments.
    """

    name: str
    backends: dict[str, Reason]
    example: Callable[[torch.device], tuple]

    def reasons(self, *args: object) -> dict[str, str | None]:
        return {name: cannot_run(*args) for name, cannot_run in self.backends.items()}


OPS: dict[str, Op] = {}
# The order of the automatic choice. cpp before triton: where both can run, the tensors are on the
# CPU and Triton would interpret.
PREFERENCE = ("cpp", "triton", "cuda", "reference")
# Backends that run only where they are named, with the reason.
BY_NAME_ONLY = {"cuda": "its speed has not been measured yet, so it runs only where it is named"}


def register(name: str, backends: dict[str, Reason], example: Callable) -> Op:
    """Enter an op into the list that `python -m fastssl.info` and the tests walk through."""
    backends = {**backends, "reference": never}
    OPS[name] = Op(name, {k: backends[k] for k in PREFERENCE if k in backends}, example)
    return OPS[name]


def is_exporting() -> bool:
    """Whether torch.export traces this call.

    The flag itself is read, since torch 2.11's Dynamo takes torch.compiler.is_exporting() for true
    under torch.compile, too.
    """
    return torch.compiler._is_exporting_flag


@torch.compiler.assume_constant_result
def _backend_of_environment() -> str | None:
    # Compiled code keeps what it found; traced, it would be compiled anew whenever any variable
    # comes or goes.
    return env.backend()


def choose_backend(op: Op, requested: str | None, *args: object) -> str:
    """Name of the backend that runs this call.

    `requested` wins over FASTSSL_BACKEND, which wins over the first backend without a reason
    against it. A named backend that cannot run raises that reason; nothing falls back silently.
    """
    if is_exporting():
        return "reference"
    named = requested or _backend_of_environment()
    if named is not None:
        if named not in op.backends:
            known = ", ".join(op.backends)
            raise ValueError(f"backend must be one of {known} for {op.name}, got {named!r}")
        reason = op.backends[named](*args)
        if reason is not None:
            raise ValueError(f"backend {named!r} cannot run {op.name}: {reason}")
        return named
    for name, cannot_run in op.backends.items():
        reason = BY_NAME_ONLY.get(name) or cannot_run(*args)
        if reason is None:
            return name
        if not torch.compiler.is_compiling():
            logger.debug("%s: not %s: %s", op.name, name, reason)
    raise AssertionError("the reference backend always runs")


_CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cannot_run_cpp(*tensors: Tensor | None) -> str | None:
    """The reason that holds for every C++ kernel: library, device, dtype."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"tensors are on {tensor.device}, not on the CPU"
        if tensor.is_floating_point() and tensor.dtype not in _CPP_DTYPES:
            return f"dtype {tensor.dtype} is served by the reference only"
    return libraries.why_no_cpp_library()


def cannot_run_cuda(*tensors: Tensor | None) -> str | None:
    """The reason that holds for every CUDA C++ kernel: library, device, dtype, architecture."""
    reason = libraries.why_no_cuda_library()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda":
            return f"tensors are on {tensor.device}, not on a GPU"
        if tensor.is_floating_point() and tensor.dtype not in _CPP_DTYPES:
            return f"dtype {tensor.dtype} is served by the reference only"
        reason = libraries.why_no_cuda_code(tensor.device)
        if reason is not None:
            return reason
    return None


def cannot_run_triton(*tensors: Tensor | None) -> str | None:
    """The reason that holds for every Triton kernel: installation, device, dtype."""
    reason = libraries.why_no_triton()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not libraries.triton_interprets():
            return f"tensors are on {tensor.device}, not on a GPU, and TRITON_INTERPRET is not set"
        if tensor.is_floating_point() and tensor.dtype not in _CPP_DTYPES:
            return f"dtype {tensor.dtype} is served by the reference only"
    return None
