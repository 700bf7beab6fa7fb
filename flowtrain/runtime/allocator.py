"""Makes the C library's allocator keep the memory that a training step frees: the next step allocates the same."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_LARGEST = 2**30, 2**25  # the second, where the library does not allow the first


def keep_freed_memory() -> bool:
    """Serve large blocks from the heap and return none to the system while the process lives; whether it is possible.

    By default each block above 32 MB is mapped, filled with zeros page by page, and unmapped again. For glibc only, and
    only where no environment variable such as MALLOC_TRIM_THRESHOLD_ is set. GPU memory is not affected.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    return any(library.mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST) and bool(
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    )
