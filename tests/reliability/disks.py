"""Disks that take no more while a run writes: as ``DISK`` says, {"fault": …, "place": …}, a run meets the fault, what
it leaves is looked at, and the same command goes on where there is room again."""

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
SIZE = 2**20  # of a small disk
NEW_NAMESPACE = 0x00020000


def small_disk(folder: Path) -> bool:
    """Mount an empty disk on ``folder``, for this process and its children alone; whether that is allowed."""
    if ctypes.CDLL(None).unshare(NEW_NAMESPACE):
        return False
    words = (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)])
    return all(subprocess.run(["mount", *each], capture_output=True, check=False).returncode == 0 for each in words)


class Disk:
    """Makes a fault, and mends it."""

    def full(self, name: str) -> None:
        with open("outputs/rest", "wb", buffering=0) as rest:
            try:
                while True:
                    rest.write(b"\0" * 4096)
            except OSError:
                pass
        self.mend = lambda: os.remove("outputs/rest")

    def limit(self, name: str) -> None:
        """The system's own limit of a file's size, a byte above what the one file has, or a part of the other's."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        (file,) = Path("outputs").glob("*/*/metrics.jsonl")
        size = file.stat().st_size + 1 if name == "metrics.jsonl" else 5000 if name == "last.pt" else 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        self.mend = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def quota(self, name: str) -> None:
        """Writing fails, as this machine's disks have no quotas."""
        if name == "tb":
            return self._events(errno.EDQUOT)
        self._open(name, errno.EDQUOT, when="written")

    def read_only(self, name: str) -> None:
        """Nothing can be opened to be written."""
        self._open(name, errno.EROFS, when="opened")

    def _events(self, number: int) -> None:
        original = RecordWriter.write

        def refusing(self, data):
            raise OSError(number, os.strerror(number))

        RecordWriter.write = refusing
        self.mend = lambda: setattr(RecordWriter, "write", original)

    def _open(self, name: str, number: int, when: str) -> None:
        original = builtins.open

        class Refusing(io.FileIO):
            def write(self, data):
                raise OSError(number, os.strerror(number))

        def refusing(file, mode="r", *args, **kwargs):
            ours = isinstance(file, str | Path) and "outputs" in str(file) and {*mode} & {*"wax+"}
            if ours and when == "opened":
                raise OSError(number, os.strerror(number), str(file))
            if ours and name in str(file):
                return io.BufferedWriter(Refusing(file, mode.replace("b", "")))
            return original(file, mode, *args, **kwargs)

        builtins.open = io.open = refusing
        if name == "metrics.jsonl":  # which is open already
            self.logger.file = Refusing(self.logger.file.name, "a")

        def mend():
            builtins.open = io.open = original

        self.mend = mend


def _trial(words, fault: str, place: str) -> None:
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

    def late(*args):
        calls.append(1)
        if len(calls) == moment:
            disk.logger = args[0]
            getattr(disk, fault.replace("-", "_"))(name)
        return original(*args)

    setattr(owner, method, late)
    try:
        report = {"code": flowtrain(".", *words), "text": ""}
    except WorkerError as error:
        report = {"code": error.exit_code, "text": str(error)}
    disk.mend()
    (run,) = Path("outputs").glob("*/*")
    report["left"] = sorted(path.name for path in run.rglob(".*.tmp"))
    report["checkpoints"] = {file.stem: checkpoint.read(file)["step"] for file in run.glob("checkpoints/*.pt")}
    report["size"] = (run / "checkpoints/last.pt").stat().st_size
    report["status"] = json.loads((run / "status.json").read_text())["resumable"]
    report["again"] = flowtrain(".", *words)
    if fault == "full":
        subprocess.run(["cp", "-r", str(run), "run"], check=True)  # the disk ends with this process
    print("\n" + json.dumps(report))


def prepare(environment, words) -> None:
    if "DISK" in environment:
        main.main = lambda: _trial(words, **json.loads(environment["DISK"]))
