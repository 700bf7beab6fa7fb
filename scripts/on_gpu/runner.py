"""Runs parts in processes of their own, each with a limit, and writes what they find after every row.

An error on a GPU spoils its process, so that a row that fails there takes no other row with it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from flowtrain.runtime import distributed, files
from flowtrain.runtime.environment import device_name
from on_gpu.part import NotHere, Part, Place
from on_gpu.parts import PARTS

SPOILED = ("CUDA error", "AcceleratorError")  # of these a process does not recover


class Worker:
    """A process that measures ``rows`` of a part, one after another."""

    def __init__(self, part: Part, rows: list[str], place: Place, end: float):
        self.part, self.rows, self.end = part, rows, end
        self.folder = Path(tempfile.mkdtemp(dir=place.folder, prefix=part.name.replace(" ", "-") + "-"))
        (self.folder / "lines").touch()
        # On the CPU a process may be a copy of this one, which has imported torch; CUDA does not survive that.
        context = multiprocessing.get_context("fork" if place.tiny else "spawn")
        place = replace(place, folder=self.folder, end=end)
        self.process = context.Process(target=measure, args=(part.name, rows, place))
        self.process.start()

    def lines(self) -> list[dict]:
        """What the process has written so far, without a line that it is writing."""
        text = (self.folder / "lines").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def figures(self) -> dict[str, dict]:
        return {line["row"]: line["figures"] for line in self.lines() if "figures" in line}

    def stop(self) -> None:
        """End the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # perhaps it leads no group yet
        self.process.join()


def measure(part: str, rows: list[str], place: Place) -> None:
    """In a process of its own: measure rows, and write a line before and after each."""
    os.setsid()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with open(place.folder / "log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with open(place.folder / "lines", "w", buffering=1) as out:
        print(json.dumps({"device": device_name(distributed.device())}), file=out)
        for row in rows:
            print(json.dumps({"row": row}), file=out)
            start, spoiled = time.monotonic(), False
            try:
                figures = PARTS[part].rows[row](place)
            except NotHere as reason:
                figures = {"not_here": str(reason)}
            except Exception as error:
                traceback.print_exc()
                figures = {"failed": f"{type(error).__name__}: {error}"[:500]}
                spoiled = any(word in figures["failed"] for word in SPOILED)
            figures["seconds"] = round(time.monotonic() - start, 1)
            print(json.dumps({"row": row, "figures": figures}), file=out)
            if spoiled:
                break
    os._exit(0)  # whatever threads a library has left


def is_known(figures: dict) -> bool:
    """Whether a row need not be measured again: it was measured, and passed if it is a check."""
    return bool(figures) and not {"failed", "not_here"} & {*figures} and figures.get("passed", True)


def run(parts: list[Part], found: dict, path: Path, seconds: float, at_once: int, tiny=False, data=None) -> int:
    """Measure what ``found`` lacks of ``parts`` within ``seconds``, ``at_once`` processes at a time; write all into
    ``path``, and print a line for each part as it ends. Returns the exit code: 1 if a row failed."""
    os.environ["OMP_NUM_THREADS"] = str(distributed.share_of_cores(at_once))
    runner = Runner(parts, found, path, time.time() + seconds, tiny, data)
    try:
        while runner.waiting or runner.running:
            for worker in [*runner.running]:
                runner.collect(worker)
            while runner.waiting and len(runner.running) < at_once and runner.may_begin():
                runner.begin()
            time.sleep(0.1)
    finally:
        for worker in runner.running:
            worker.stop()
    files.write_json(path, runner.found)
    bad = [f"{name}, {row}" for name, rows in runner.found["parts"].items() for row in failures(rows)]
    print(f"{path}: {len(bad)} rows failed" + "".join(f"\n  {one}" for one in bad), flush=True)
    return 1 if bad else 0


class Runner:
    """Parts on their way: those waiting, the processes that measure others, and what was found."""

    def __init__(self, parts: list[Part], found: dict, path: Path, end: float, tiny: bool, data: Path | None):
        self.found, self.path, self.start, self.end, self.tiny = {"parts": {}, **found}, path, time.time(), end, tiny
        self.place = Place(Path(tempfile.mkdtemp(prefix="flowtrain-gpu-")), end, tiny, data)
        self.running: list[Worker] = []
        self.waiting = [(part, rows) for part in parts for rows in self.shares(part)]

    def shares(self, part: Part) -> list[list[str]]:
        """The rows still to be measured, divided among the part's processes."""
        known = self.rows(part)
        rows = [row for row in (self.tiny and part.rehearsed) or part.rows if not is_known(known.get(row, {}))]
        return [share for share in (rows[i :: part.processes] for i in range(part.processes)) if share]

    def rows(self, part: Part) -> dict[str, dict]:
        """What is known of a part."""
        return self.found["parts"].setdefault(part.name, {})

    def may_begin(self) -> bool:
        return self.tiny or not (self.waiting[0][0].last and self.running)

    def begin(self) -> None:
        """Start the process that waits first, if there is time."""
        part, rows = self.waiting.pop(0)
        until = self.end - sum(other.seconds for other, _ in self.waiting if other.last)
        if not part.last:
            until = min(until, time.time() + part.seconds * (4 if self.tiny else 1))
        if time.time() < until - 3:
            self.running.append(Worker(part, rows, self.place, until))
        else:
            self.say(part)

    def collect(self, worker: Worker) -> None:
        """Keep what a process has measured. Where it has ended, another measures what it left; where its time is up,
        it is ended."""
        late = time.time() > worker.end
        ended = late or not worker.process.is_alive()
        if ended:
            worker.stop()
            self.running.remove(worker)
        if self.keep(worker):
            files.write_json(self.path, self.found)
        if ended and not late and (left := self.left(worker)):
            self.waiting.insert(0, (worker.part, left))
        if ended and worker.part not in [*(one.part for one in self.running), *(part for part, _ in self.waiting)]:
            self.say(worker.part)

    def keep(self, worker: Worker) -> bool:
        """Whether a process has measured more than is known.

        Raises:
            SystemExit: on another device than what is known.
        """
        device = next((line["device"] for line in worker.lines() if "device" in line), None)
        if device and self.found.setdefault("device", device) != device:
            worker.stop()
            raise SystemExit(f"{self.path} is of {self.found['device']}, this is {device}: give another by --results")
        rows, figures = self.rows(worker.part), worker.figures()
        if all(rows.get(row) == one for row, one in figures.items()):
            return False
        rows.update(figures)
        self.found.update(date=f"{date.today()}", torch=torch.__version__)
        return True

    def left(self, worker: Worker) -> list[str]:
        """The rows that a process has not measured. One at which it died has failed; all, if it never began."""
        left = [row for row in worker.rows if row not in worker.figures()]
        begun = [line["row"] for line in worker.lines() if "row" in line]
        if begun and begun[-1] not in left:
            return left
        died = left[:1] if begun else left
        log = (worker.folder / "log").read_text(errors="replace") if (worker.folder / "log").exists() else ""
        why = f"the process ended with code {worker.process.exitcode}: {log[-300:]}"
        self.rows(worker.part).update({row: {"failed": why} for row in died})
        return left[len(died) :]

    def say(self, part: Part) -> None:
        """Print a line on a part that has ended."""
        rows, now = self.rows(part), time.time()
        done = sum(map(is_known, rows.values()))
        bad, reasons = failures(rows), {figures["not_here"] for figures in rows.values() if "not_here" in figures}
        text = [f"{done} of {len(part.rows)} rows measured"]
        text += [f"{len(bad)} failed"] if bad else []
        text += [f"others: {'; '.join(sorted(reasons))}"] if reasons else []
        left = f"{self.end - now:.0f} s left"
        print(f"{now - self.start:5.0f} s  {part.name}: {', '.join(text)} ({left})", flush=True)


def failures(rows: dict) -> list[str]:
    bad = {row: one for row, one in rows.items() if "failed" in one or not one.get("passed", True)}
    return [f"{row}: {one.get('failed') or one}" for row, one in bad.items()]
