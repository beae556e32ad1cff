"""What nt_xent compiles of common/contrastive_triton_kernels.py, at production shapes."""

from fastssl.kernels.common import contrastive_triton_kernels as kernels
from fastssl.kernels.common.contrastive_triton import SIGNATURES, aot_options
from fastssl.kernels.common.triton_utils import AotCase


def aot_cases() -> list[AotCase]:
    """SimCLR's 128 dimensions and wider ones."""
    cases = []
    scales = {"HAS_ROW_SCALE": True, "HAS_COLUMN_SCALE": True}
    for dtype, dim in (("bf16", 128), ("fp16", 256), ("fp32", 128), ("fp32", 512), ("bf16", 512)):
        constexprs, launch = aot_options(dtype, dim)
        variant = f"pairs_{dtype}_{dim}"
        cases.append(
            AotCase(
                kernels._contrastive_stream_kernel,
                SIGNATURES["stream"](dtype),
                {**scales, "SKIPS_OWN": True, "HAS_WEIGHTED": False, **constexprs},
                **launch,
                variant=variant,
            )
        )
        cases.append(
            AotCase(
                kernels._contrastive_gradient_kernel,
                SIGNATURES["gradient"](dtype),
                {**scales, "IS_PAIR": True, **constexprs},
                **launch,
                variant=variant,
            )
        )
    return cases
