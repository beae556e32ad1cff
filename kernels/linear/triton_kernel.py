"""linear in Triton: the sums of the bias's gradient; the products are torch's."""

from fastssl.kernels.common.triton_columns import aot_cases

__all__ = ["aot_cases"]
