"""linear_dino_cross_entropy in Triton: the kernels of common/triton_view_cross_entropy.py on blocks
of logits, with a length for every prototype."""

from fastssl.kernels.common import triton_view_cross_entropy as kernels
from fastssl.kernels.common.triton_utils import AotCase
from fastssl.kernels.linear_dino_cross_entropy.blocks import GPU_BLOCKS


def aot_cases() -> list[AotCase]:
    size = GPU_BLOCKS[0][1]
    columns = size // kernels.block_k(size) + 1
    return kernels.pass_cases(size, scaled=True) + kernels.collapse_cases(columns)
