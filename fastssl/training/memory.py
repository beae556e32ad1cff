"""How the C library keeps memory that a training step frees and the next one needs again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc not to return freed memory to the system; False where there is no glibc.

    A step frees hundreds of MB of gradients and activations at once. By default glibc gives them
    back, and the next step pays for every page again: a quarter of the time of a small model's step
    on a CPU. The process keeps the memory of its largest step instead. This is for a process that
    trains; it holds for all of it and cannot be undone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Above 32 MB glibc takes memory from the system in any case unless told otherwise.
    kept = mallopt(M_MMAP_THRESHOLD, 1 << 30) == 1
    return mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1 and kept
