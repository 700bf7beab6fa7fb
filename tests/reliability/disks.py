"""Disks that fail while a run writes.

``DISK`` in the environment, {"fault": …, "place": …}, makes a command run with a fault, report what it left, repair the
disk and run again.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import os
import resource
import subprocess
from pathlib import Path

from inprocess import flowtrain
from tensorboard.summary.writer.record_writer import RecordWriter

from flowtrain.cli import main
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.engine.loggers import ImageFiles, JsonLines, TensorBoard
from flowtrain.runtime import checkpoint

FAULTS = {"full": errno.ENOSPC, "limit": errno.EFBIG, "quota": errno.EDQUOT, "read-only": errno.EROFS}
PLACES = {"checkpoint": "last.pt", "metrics": "metrics.jsonl", "image": "samples_00000060.png", "board": "tb"}
SIZE = 2**20  # bytes of a small disk
NEW_NAMESPACE = 0x00020000


def small_disk(folder: Path) -> bool:
    """Mount an empty disk on ``folder``, for this process and its children only. Returns whether that is allowed."""
    if ctypes.CDLL(None).unshare(NEW_NAMESPACE):
        return False
    words = (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)])
    return all(subprocess.run(["mount", *each], capture_output=True, check=False).returncode == 0 for each in words)


class Disk:
    """Makes the disk fail; ``repair()`` undoes that."""

    def full(self, name: str) -> None:
        """Fill the disk."""
        with open("outputs/rest", "wb", buffering=0) as rest:
            try:
                while True:
                    rest.write(b"\0" * 4096)
            except OSError:
                pass
        self.repair = lambda: os.remove("outputs/rest")

    def limit(self, name: str) -> None:
        """Lower the limit of a file's size: a byte more than metrics.jsonl has, or less than the other files need."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        (file,) = Path("outputs").glob("*/*/metrics.jsonl")
        size = file.stat().st_size + 1 if name == "metrics.jsonl" else 5000 if name == "last.pt" else 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        self.repair = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def quota(self, name: str) -> None:
        """Make writing fail; a test machine's disks have no quotas."""
        if name == "tb":
            return self._fail_events(errno.EDQUOT)
        self._fail_files(name, errno.EDQUOT, when="write")

    def read_only(self, name: str) -> None:
        """Make opening files for writing fail."""
        self._fail_files(name, errno.EROFS, when="open")

    def _fail_events(self, number: int) -> None:
        original = RecordWriter.write

        def fail(self, data):
            raise OSError(number, os.strerror(number))

        RecordWriter.write = fail
        self.repair = lambda: setattr(RecordWriter, "write", original)

    def _fail_files(self, name: str, number: int, when: str) -> None:
        original = builtins.open

        class FailingFile(io.FileIO):
            def write(self, data):
                raise OSError(number, os.strerror(number))

        def failing_open(file, mode="r", *args, **kwargs):
            ours = isinstance(file, str | Path) and "outputs" in str(file) and {*mode} & {*"wax+"}
            if ours and when == "open":
                raise OSError(number, os.strerror(number), str(file))
            if ours and name in str(file):
                return io.BufferedWriter(FailingFile(file, mode.replace("b", "")))
            return original(file, mode, *args, **kwargs)

        builtins.open = io.open = failing_open
        if name == "metrics.jsonl":  # it is open already
            self.logger.file = FailingFile(self.logger.file.name, "a")

        def repair():
            builtins.open = io.open = original

        self.repair = repair


def _run_with_fault(words, fault: str, place: str) -> None:
    """Run a command whose disk fails, print a report of what it left, repair the disk and run the command again."""
    if fault == "full":
        Path("outputs").mkdir()
        if not small_disk(Path("outputs")):
            return print("\nno mounts")
    disk, name = Disk(), PLACES[place]
    owner, method, moment = {
        "checkpoint": (checkpoint, "save_last", 2),
        "metrics": (JsonLines, "scalars", 27),
        "board": (TensorBoard, "scalars", 27),
        "image": (ImageFiles, "image", 1),
    }[place]
    original, calls = getattr(owner, method), []

    def fail_at_moment(*args):
        calls.append(1)
        if len(calls) == moment:
            disk.logger = args[0]
            getattr(disk, fault.replace("-", "_"))(name)
        return original(*args)

    setattr(owner, method, fail_at_moment)
    try:
        report = {"code": flowtrain(".", *words), "text": ""}
    except WorkerError as error:
        report = {"code": error.exit_code, "text": str(error)}
    disk.repair()
    (run,) = Path("outputs").glob("*/*")
    report["left"] = sorted(path.name for path in run.rglob(".*.tmp"))
    report["checkpoints"] = {file.stem: checkpoint.read(file)["step"] for file in run.glob("checkpoints/*.pt")}
    report["size"] = (run / "checkpoints/last.pt").stat().st_size
    report["status"] = json.loads((run / "status.json").read_text())["resumable"]
    report["again"] = flowtrain(".", *words)
    if fault == "full":
        subprocess.run(["cp", "-r", str(run), "run"], check=True)  # the disk vanishes with this process
    print("\n" + json.dumps(report))


def prepare(environment, words) -> None:
    """Patch this process as the environment says."""
    if "DISK" in environment:
        main.main = lambda: _run_with_fault(words, **json.loads(environment["DISK"]))
