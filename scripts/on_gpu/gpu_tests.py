"""The tests that need a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from on_gpu.part import Part, Place, verdict

MARK = "needs a GPU"  # the reason for which they are skipped elsewhere


def run(place: Place) -> dict:
    """Run those tests of the files that have one whose names say gpu."""
    place.need_gpu()
    files = [str(file) for file in sorted(Path("tests").glob("test_*.py")) if MARK in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=place.end - time.time())
    print(done.stdout, done.stderr, flush=True)
    said = done.stdout.strip().splitlines()[-1].strip("= ")
    return {"said": said, "passed": not done.returncode and "passed" in said}


PART = Part(
    "tests",
    "The tests that are skipped without a GPU.",
    {"tests that need a GPU": run},
    {"said": lambda row: row["said"], "passed": verdict},
    seconds=150,
)
