"""Memory of this process: keep freed memory instead of returning it to the kernel."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, and its threads share it.

    Otherwise each large matrix is new memory, whose pages cost a fault each: a tenth of the time of decoding.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # names and numbers of malloc.h
        mallopt(trim_threshold, -1)  # never: what a training step frees in the end may be gigabytes
        if not mallopt(mmap_threshold, 2**30):
            # older versions of glibc refuse more, and would then map and unmap whatever exceeds 128 KiB
            mallopt(mmap_threshold, 2**25)
        mallopt(arena_max, 1)
