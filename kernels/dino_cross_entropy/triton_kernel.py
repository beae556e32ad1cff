"""dino_cross_entropy in Triton: the kernels of common/triton_view_cross_entropy.py on stored
logits."""

from fastssl.kernels.common import triton_view_cross_entropy as kernels
from fastssl.kernels.common.triton_utils import AotCase

NUM_PROTOTYPES = 65536


def aot_cases() -> list[AotCase]:
    chunks = NUM_PROTOTYPES // kernels.block_k(NUM_PROTOTYPES)
    return kernels.pass_cases(NUM_PROTOTYPES, scaled=False) + kernels.combine_cases(chunks)
