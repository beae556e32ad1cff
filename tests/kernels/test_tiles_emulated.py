"""mask_unit_attention's bfloat16 kernels on both units that multiply pairs, whatever this processor
has: AMX's tiles in software (tiles_emulated.cpp), and dot products."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastssl.kernels.common import env
from fastssl.kernels.mask_unit_attention import reference
from tests.kernels.util import assert_close_to_truth, gradients

ROOT = Path(__file__).parents[2]
# U, S, D, H: whole tiles and parts of them in every dimension, units that share one, pooling.
SHAPES = [
    *((64, 1, 96, 1), (16, 1, 96, 2), (80, 1, 96, 2), (64, 1, 72, 2), (196, 1, 32, 2)),
    *((50, 1, 64, 2), (64, 4, 72, 2), (16, 4, 72, 2), (4, 1, 96, 2), (4, 4, 96, 1), (7, 1, 24, 3)),
    *((8, 8, 8, 1), (33, 1, 40, 2), (1, 1, 16, 1), (256, 1, 56, 1), (48, 1, 144, 1)),
    *(
        (33, 1, 7, 2),
        (16, 4, 9, 1),
        (66, 2, 20, 2),
        (256, 4, 16, 1),
        (31, 1, 24, 2),
        (64, 1, 56, 2),
    ),
]


@pytest.fixture(scope="module", params=["tiles", "dots"])
def library(request, tmp_path_factory):
    compiler = shutil.which(env.cxx())
    if compiler is None or not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("needs a C++ compiler and a processor with AVX-512 BF16")
    torch_folder = Path(torch.__file__).parent
    target = tmp_path_factory.mktemp("tiles") / f"{request.param}.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DUNIT={request.param}"]
    flags += ["-isystem", str(torch_folder / "include"), "-I", str(ROOT / "csrc/cpu")]
    source = str(Path(__file__).with_name("tiles_emulated.cpp"))
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = [compiler, *flags, source, "-o", str(target), *link]
    done = subprocess.run(command, capture_output=True, text=True)
    if "too old for products of pairs" in done.stderr:
        pytest.skip("the C++ compiler is too old for these kernels")
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(target))


def attend(library, shape, units, qkv, dout=None):
    U, S, D, H = shape
    tokens = units * U if dout is not None else units * U // S
    # What is written past the end is seen.
    channels = (3 if dout is not None else 1) * H * D
    guarded = torch.full((tokens * channels + 64,), torch.nan).bfloat16()
    out = guarded[:-64].view(1, tokens, channels)
    # Bytes of NaNs, as fresh memory may hold.
    scratch = torch.full((16 << 20,), 255, dtype=torch.uint8)
    start = -scratch.data_ptr() % 64
    pointers = [qkv, dout, out, scratch[start:]]
    library.attend(
        *map(ctypes.c_int64, (H, D, U, S, units)),
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in pointers),
    )
    assert guarded[-64:].isnan().all()
    return out


@pytest.mark.parametrize("units", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(library, shape, units):
    U, S, D, H = shape
    qkv = torch.randn(1, units * U, 3 * H * D).bfloat16()
    dout = torch.randn(1, units * U // S, H * D).bfloat16()

    def formula(x):
        return reference.mask_unit_attention(x, H, U, S)

    eager, (eager_grad,) = gradients(formula, [qkv], dout)
    truth, (true_grad,) = gradients(formula, [qkv.double()], dout)
    # exp2 is good for bfloat16.
    assert_close_to_truth("out", attend(library, shape, units, qkv), eager, truth, 2e-3)
    assert_close_to_truth(
        "dqkv", attend(library, shape, units, qkv, dout), eager_grad, true_grad, 2e-3
    )
