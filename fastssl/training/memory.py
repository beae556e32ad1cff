"""Memory of a process that does the same over and over."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the next step allocates as much again.

    By default glibc gives large blocks back to the system, and a training step on a CPU maps and
    clears hundreds of MB anew, page by page. The process does not get larger by it. True where the
    C library takes the advice; what MALLOC_* variables say is left alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(option, _LARGEST) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)])
