"""Every file of csrc/cuda compiles for sm_80, sm_90a and sm_100, and no kernel spills."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastssl.kernels.common import env, libraries

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
ARCHITECTURES = ("80", "90a", "100")
# More registers would let less than two blocks of 256 threads run on a processor.
MAX_REGISTERS = 128
_USAGE = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.name)
def test_compiles_without_spills(source, tmp_path):
    nvcc = env.nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on the path, in $NVCC or in $CUDA_HOME")
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    # The device's code only, which is what ptxas reports on.
    flags += ["-fatbin", "-Xptxas", "-v", "--threads", "2", "-isystem", str(include)]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [nvcc, *flags, str(source), "-o", str(tmp_path / "kernels.fatbin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    used = _USAGE.findall(done.stdout + done.stderr)
    kernels = Counter(architecture for _, architecture, *_ in used)
    assert set(kernels) == set(ARCHITECTURES) and len(set(kernels.values())) == 1, kernels
    for name, architecture, *numbers in used:
        stack, stores, loads, registers = map(int, numbers)
        assert stack == stores == loads == 0, f"{name} spills on sm_{architecture}: {numbers}"
        assert registers <= MAX_REGISTERS, f"{name} on sm_{architecture}: {registers} registers"


@pytest.mark.gpu
def test_the_library_runs_on_this_gpu():
    """Else the op tests would leave the backend out without a word."""
    if env.nvcc() is None:
        pytest.skip("no nvcc on the path, in $NVCC or in $CUDA_HOME")
    assert libraries.why_no_cuda_library() is None
    assert libraries.why_no_cuda_code(torch.device("cuda")) is None
