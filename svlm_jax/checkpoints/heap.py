"""Memory that is freed and taken again without the system: its pages are zeroed once, not once for every buffer.

Half of the processor time of a conversion, which takes and frees gigabytes, went into new pages.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # glibc's malloc.h
KEPT = 1 << 30  # bytes at most, of what is smaller: two groups of parameters and this stay under 3 GB
LARGEST = 64 << 20  # bytes: a larger buffer goes back to the system when it is freed, so that there is room for the next one of its kind


def keep_freed() -> bool:
    """For the rest of this process; its memory then stays what it was at most. Whether the C library could be told: glibc can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) for name, value in ((MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, KEPT), (ARENA_MAX, 1)))
