"""Every FASTSSL_* variable is read here and nowhere else; ENVS.md lists them.

This file imports nothing of the project, so that setup.py can load it by path.
"""

import os


def backend() -> str | None:
    """FASTSSL_BACKEND: the backend every op must use, None for the automatic choice."""
    return os.environ.get("FASTSSL_BACKEND") or None


def build_cpp() -> bool:
    """FASTSSL_BUILD_CPP=0: install without compiling the CPU library."""
    return os.environ.get("FASTSSL_BUILD_CPP", "1") != "0"


def cxx() -> str:
    """CXX: the C++ compiler of the CPU library."""
    return os.environ.get("CXX") or "g++"


def require_cpp() -> bool:
    """FASTSSL_REQUIRE_CPP=1: a failing compiler fails the installation."""
    return os.environ.get("FASTSSL_REQUIRE_CPP", "0") == "1"


def update_resources() -> bool:
    """FASTSSL_UPDATE_RESOURCES=1: the ahead-of-time test rewrites its table."""
    return os.environ.get("FASTSSL_UPDATE_RESOURCES", "0") == "1"
