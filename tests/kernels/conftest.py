"""The CUDA kernels compiled for the host: see tests/cuda_emulator.h."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from fastssl.kernels.common import env

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which(env.cxx()) is None:
        pytest.skip(f"no C++ compiler called {env.cxx()}")
    library = tmp_path_factory.mktemp("emulated") / "cuda.so"
    folders = ["-I", REPOSITORY / "csrc/cuda", "-I", REPOSITORY / "tests"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", *folders]
    source = REPOSITORY / "tests/kernels/cuda_emulated.cpp"
    command = [env.cxx(), *flags, source, "-o", library]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(library))
