"""The compiled libraries: plain shared objects beside fastssl/kernels/__init__.py, all optional.

The answers below hold for the life of the process; torch.compile takes them as constants instead of
tracing into how they are found.
"""

import functools
import sys
from pathlib import Path

import torch

_FOLDER = Path(sys.modules["fastssl.kernels"].__file__).parent


@torch.compiler.assume_constant_result
def why_no_cpp_library() -> str | None:
    """None once the CPU's fastssl_csrc ops are loaded, else the reason in words."""
    return _load_cpp_library()


@torch.compiler.assume_constant_result
def bf16_unit() -> str:
    """What the CPU library multiplies bfloat16 on: "tiles" (Intel's AMX), "dots" of pairs (AVX-512
    BF16), or "none"."""
    return _find_bf16_unit()


@torch.compiler.assume_constant_result
def why_no_cuda_library() -> str | None:
    """None once the GPU's fastssl_cuda ops are loaded, else the reason in words."""
    return _load_cuda_library()


@torch.compiler.assume_constant_result
def why_no_cuda_code(device: torch.device) -> str | None:
    """None if the loaded CUDA library holds code for this GPU, else the reason in words."""
    return _find_cuda_code(torch.cuda.current_device() if device.index is None else device.index)


@torch.compiler.assume_constant_result
def why_no_triton() -> str | None:
    """None if Triton can be imported, else the reason in words."""
    return _import_triton()


@torch.compiler.assume_constant_result
def triton_interprets() -> bool:
    """Whether Triton runs its kernels in its interpreter (TRITON_INTERPRET=1), on any device."""
    return _triton_interprets()


def _cause(error: OSError) -> BaseException:
    """What the dynamic linker says; torch's own error names the file alone."""
    return error.__cause__ or error


@functools.cache
def _load_cpp_library() -> str | None:
    path = _FOLDER / "_cpu.so"
    if not path.exists():
        return (
            "the CPU library is not built (reinstall with a C++17 compiler at hand; "
            "FASTSSL_REQUIRE_CPP=1 makes a failed build an error)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CPU library did not load into torch {torch.__version__}: {_cause(error)}"
    return None


@functools.cache
def _find_bf16_unit() -> str:
    # Asked once: torch's stable ABI never frees a returned string, and blocks that stay between
    # the large ones of a training step make malloc take new memory in every step.
    return torch.ops.fastssl_csrc.bf16_unit() if _load_cpp_library() is None else "none"


@functools.cache
def _load_cuda_library() -> str | None:
    # Not before an op asks: a look for GPUs initialises the driver, and processes that are forked
    # after that cannot use it.
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    path = _FOLDER / "_cuda.so"
    if not path.exists():
        return "the CUDA library is not built (reinstall with nvcc at hand, see ENVS.md)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CUDA library did not load into torch {torch.__version__}: {_cause(error)}"
    return None


@functools.cache
def _find_cuda_code(index: int) -> str | None:
    if torch.ops.fastssl_cuda.runs_on(index):
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"the CUDA library holds no code for sm_{major}{minor} "
        "(FASTSSL_CUDA_ARCHITECTURES, see ENVS.md)"
    )


@functools.cache
def _import_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


@functools.cache
def _triton_interprets() -> bool:
    if _import_triton() is not None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


# Now rather than at the first choice of a backend: a registered op may be called by name before.
_load_cpp_library()
