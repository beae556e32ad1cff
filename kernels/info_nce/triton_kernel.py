"""What info_nce compiles of common/contrastive_triton_kernels.py, at production shapes."""

from fastssl.kernels.common import contrastive_triton_kernels as kernels
from fastssl.kernels.common.contrastive_triton import BLOCK_M, SIGNATURES, aot_options
from fastssl.kernels.common.triton_utils import AotCase


def aot_cases() -> list[AotCase]:
    """MoCo's queue in bf16 and float32, a memory bank, gradients of keys; CLIP's 512 dimensions."""
    cases = []
    for dtype, dim in (("bf16", 128), ("fp16", 256), ("fp32", 128), ("fp32", 512), ("bf16", 512)):
        flags = {"HAS_ROW_SCALE": True, "SKIPS_OWN": False, "HAS_WEIGHTED": True}
        constexprs, launch = aot_options(dtype, dim)
        variant = f"keys_{dtype}_{dim}"
        cases.append(
            AotCase(
                kernels._contrastive_stream_kernel,
                SIGNATURES["stream"](dtype),
                {**flags, "HAS_COLUMN_SCALE": True, **constexprs},
                **launch,
                variant=variant,
            )
        )
        cases.append(
            AotCase(
                kernels._contrastive_gradient_kernel,
                SIGNATURES["gradient"](dtype),
                {"HAS_ROW_SCALE": True, "HAS_COLUMN_SCALE": True, "IS_PAIR": False, **constexprs},
                **launch,
                variant=variant,
            )
        )
    cases.append(
        AotCase(
            kernels._contrastive_per_row_kernel,
            SIGNATURES["per_row"]("bf16"),
            {"HAS_ROW_SCALE": True, "HAS_WEIGHTED": True, "BLOCK_M": BLOCK_M, "BLOCK_D": 128},
            num_warps=4,
        )
    )
    return cases
