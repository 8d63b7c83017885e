"""Memory of this process: keep freed memory instead of returning it to the kernel."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Keep freed memory in this process, in one pool for all threads.

    Otherwise the kernel maps new pages for each large matrix; their page faults take a tenth of decoding.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # names and numbers of malloc.h
        mallopt(trim_threshold, -1)  # never trim: a training step may free gigabytes when it ends
        if not mallopt(mmap_threshold, 2**30):
            # Older versions of glibc refuse 2**30 and would map and unmap every block above 128 KiB.
            mallopt(mmap_threshold, 2**25)
        mallopt(arena_max, 1)
