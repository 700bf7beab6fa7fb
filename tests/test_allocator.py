"""Freed memory is used again without new page faults."""

import ctypes
import os
import subprocess
import sys

import pytest

from flowtrain.runtime.allocator import keep_freed_memory

FAULTS = """
import ctypes, resource, sys
from flowtrain.runtime.allocator import keep_freed_memory
done = sys.argv[1] == "keep" and keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(48 * 2**20)
    ctypes.memset(block, 1, 48 * 2**20)
    library.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(done), faults[0], sum(faults[1:]))
"""

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")


def faults(mode, **variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], env=env, capture_output=True, text=True, check=True)
    return map(int, done.stdout.split())


@glibc
def test_freed_memory_is_kept():
    done, first, later = faults("keep")
    assert done and later < first / 2
    done, first, later = faults("leave")
    assert not done and later > 4 * first  # what keeping saves


@glibc
def test_the_environment_overrides():
    done, first, later = faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert not done and later > first


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    assert keep_freed_memory() is False
