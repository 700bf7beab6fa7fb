"""Promise 6: a disk that fails costs a run only the work since its last checkpoint, and one line gives the reason."""

import errno
import json
import os
import re

import disks
import pytest
from forks import are_equal, read_metrics, read_state, runs_in

WORDS = (
    "train",
    "model=realnvp_vector",
    "model.pairs=1",
    "model.hidden=8",
    "dataset=moons",
    "dataset.rows=400",
    "batch_size=32",
    "max_steps=70",
    "trainer.log_every=1",
    "trainer.val_every=20",
    "trainer.sample_every=60",
    "trainer.save_every=25",
    "logger=none",
    "resume=true",
)
CASES = [(fault, place) for place in ("checkpoint", "metrics", "image") for fault in disks.FAULTS]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The metrics and the state of a run without a fault."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert server.run(folder, *WORDS) == 0
    (run,) = runs_in(folder)
    return read_metrics(run), read_state(run)


def describes(text: str, fault: str, place: str, size: int) -> bool:
    """Whether a message names the file, the reason, the bytes needed and the bytes free."""
    why = re.escape(os.strerror(disks.FAULTS[fault]))
    found = re.fullmatch(
        rf"\S*/{re.escape(disks.PLACES[place])}: cannot be written \({why}\): ([\d,]+) bytes needed, ([\d,]+) free"
        r"(, at most [\d,]+ a file)?; the same command with resume=true goes on from the last checkpoint",
        text,
    )
    if not found:
        return False
    needed, free = (int(number.replace(",", "")) for number in found.groups()[:2])
    likely = {"checkpoint": abs(needed - size) < 500, "metrics": 100 < needed < 400, "image": needed > 1000}[place]
    return likely and (free < 4096 if fault == "full" else free > 2**20) and bool(found[3]) == (fault == "limit")


def survives(server, cwd, whole, fault, place) -> bool | None:
    """Whether a run survives a fault as promised; None if this machine cannot cause the fault."""
    process = server.start(cwd, *WORDS, DISK=json.dumps({"fault": fault, "place": place}))
    assert process.wait() == 0, process.err
    last = process.out.splitlines()[-1]
    if last == "no mounts":
        return None
    report = json.loads(last)
    run = cwd / "run" if fault == "full" else runs_in(cwd)[0]
    step = 50 if place == "image" else 25
    print(report, process.err)
    return (
        report["code"] == 1
        and describes(report["text"], fault, place, report["size"])
        and not process.err
        and report["left"] == []
        and report["checkpoints"]["last"] == step
        and report["status"]
        and report["again"] == 0
        and are_equal(read_metrics(run), whole[0])
        and are_equal(read_state(run), whole[1])
    )


def test_a_run_survives_every_fault_of_its_disk(server, whole, tmp_path, count, promise):
    chosen = CASES[:: 1 + 4 * (count(10) == 1)]  # three, of different faults and places, in a plain run
    results = {case: survives(server, tmp_path / "-".join(case), whole, *case) for case in chosen}
    possible = [case for case in chosen if results[case] is not None]
    promise(
        6,
        "disk full, limit, quota, read-only, in checkpoint, metrics, image: told, nothing lost, resumed",
        f"{sum(results[case] for case in possible)} of {len(possible)}",
    )
    assert [case for case in possible if not results[case]] == []
    assert possible == chosen or os.geteuid()  # only root mounts disks


def test_tensorboards_thread_prints_no_traceback(server, tmp_path):
    words = [word.replace("logger=none", "logger=tensorboard") for word in WORDS]
    process = server.start(tmp_path, *words, DISK=json.dumps({"fault": "quota", "place": "board"}))
    assert process.wait() == 0, process.err
    report = json.loads(process.out.splitlines()[-1])
    assert re.match(r"\S*/tb: cannot be written \(Disk quota exceeded\): [\d,]+ free; the same", report["text"])
    assert report["code"] == 1 and report["again"] == 0 and not process.err


def test_the_message_says_if_nothing_was_saved_yet(tmp_path, monkeypatch):
    from inprocess import flowtrain

    from flowtrain.cli.exit_codes import WorkerError

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkerError, match=r"best\.pt: cannot be written .*; nothing was saved yet$"):
        flowtrain(tmp_path, *WORDS)
