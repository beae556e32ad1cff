"""vicreg in Triton: the passes of common/triton_gram.py between matrix products."""

from fastssl.kernels.common import triton_gram
from fastssl.kernels.common.triton_utils import AotCase


def aot_cases() -> list[AotCase]:
    return triton_gram.aot_cases(views=2, crossed=False)
