"""Which bytes of files Linux has in memory, and which a process had to read from the disk."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

LIBC = ctypes.CDLL(None, use_errno=True)


def drop_from_cache(files: Iterable[Path]) -> int:
    """Let the system forget files, so that the next to look at them reads the disk.

    Returns: bytes that it keeps all the same: pages that a process has mapped, or a file system that is in memory.
    """
    kept = 0
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # what is not written yet is kept
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        kept += count_cached_bytes(file)
    return kept


def count_cached_bytes(file: Path) -> int:
    """Return how many bytes of a file are in memory, in whole pages. Raises: OSError."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        content = np.frombuffer(mapped, dtype=np.uint8)
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), dtype=np.uint8)
        address, size, table = content.ctypes.data, len(mapped), pages.ctypes.data
        failed = LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(table))
        del content  # or the file could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    return int((pages & 1).sum()) * mmap.PAGESIZE


def count_disk_bytes() -> int:
    """Return how many bytes this process has had read from disks so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
