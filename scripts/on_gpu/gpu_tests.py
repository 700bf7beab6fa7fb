"""The tests that need a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from on_gpu.part import Part, Place, verdict

MARK = 'reason="needs a GPU"'  # for which they are skipped elsewhere


def command() -> list[str]:
    """Runs the tests that are skipped under some condition, in the files where this is the lack of a GPU."""
    files = [str(file) for file in sorted(Path("tests").glob("test_*.py")) if MARK in file.read_text()]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "skipif", *files]


def run(place: Place) -> dict:
    """Run the tests that need a GPU."""
    place.need_gpu()
    done = subprocess.run(command(), capture_output=True, text=True, timeout=place.end - time.time())
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
