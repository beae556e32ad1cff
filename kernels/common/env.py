"""Every FASTSSL_* variable is read here and nowhere else; ENVS.md lists them.

This file imports nothing of the project, so that setup.py can load it by path.
"""

import os
import shutil
from pathlib import Path

_BACKEND = os.environ.encodekey("FASTSSL_BACKEND")


def backend() -> str | None:
    """FASTSSL_BACKEND: the backend every op must use, None for the automatic choice."""
    # Asked itself, os.environ raises and catches an exception for a variable that is not set, which
    # every call of an op would pay for.
    entries = getattr(os.environ, "_data", None)
    if entries is not None and _BACKEND not in entries:
        return None
    return os.environ.get("FASTSSL_BACKEND") or None


ATTENTIONS = ("torch", "flash_attn", "xformers")


def attention() -> str | None:
    """FASTSSL_ATTENTION: the implementation of attention, None for the automatic choice."""
    name = os.environ.get("FASTSSL_ATTENTION") or None
    if name is not None and name not in ATTENTIONS:
        known = ", ".join(ATTENTIONS)
        raise ValueError(f"FASTSSL_ATTENTION must be one of {known}, got {name!r}")
    return name


def cache_dir() -> Path:
    """FASTSSL_CACHE: where indices and downloaded shards are kept; else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.environ.get("FASTSSL_CACHE") or os.path.join(home, "fastssl")).expanduser()


def cache_bytes() -> int:
    """FASTSSL_CACHE_GB: the room for downloaded shards in the cache, in units of 10**9 bytes."""
    value = os.environ.get("FASTSSL_CACHE_GB") or "100"
    try:
        gigabytes = float(value)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise ValueError(f"FASTSSL_CACHE_GB must be a positive number, got {value!r}")
    return int(gigabytes * 10**9)


def build_cpp() -> bool:
    """FASTSSL_BUILD_CPP=0: install without compiling the CPU library."""
    return os.environ.get("FASTSSL_BUILD_CPP", "1") != "0"


def build_cuda() -> bool | None:
    """FASTSSL_BUILD_CUDA: whether to compile the CUDA library; None where nothing is said."""
    value = os.environ.get("FASTSSL_BUILD_CUDA")
    return None if not value else value != "0"


def cuda_architectures() -> list[str]:
    """FASTSSL_CUDA_ARCHITECTURES: what the CUDA library is compiled for."""
    return (os.environ.get("FASTSSL_CUDA_ARCHITECTURES") or "80 90a 100").split()


def cxx() -> str:
    """CXX: the C++ compiler of the CPU library."""
    return os.environ.get("CXX") or "g++"


def nvcc() -> str | None:
    """NVCC: the compiler of the CUDA library; else the one on the path, else CUDA_HOME's."""
    if os.environ.get("NVCC"):
        return shutil.which(os.environ["NVCC"])
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))


def require_cpp() -> bool:
    """FASTSSL_REQUIRE_CPP=1: a failing compiler fails the installation."""
    return os.environ.get("FASTSSL_REQUIRE_CPP", "0") == "1"


def update_resources() -> bool:
    """FASTSSL_UPDATE_RESOURCES=1: the ahead-of-time test rewrites its table."""
    return os.environ.get("FASTSSL_UPDATE_RESOURCES", "0") == "1"
