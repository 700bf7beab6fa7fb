"""Promise 6: a disk that takes no more costs a run what it did since its last checkpoint; one line says what lacks."""

import errno
import json
import os
import re

import disks
import pytest
from forks import runs_in, same, state, steps

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
    "trainer.tensorboard=false",
    "resume=true",
)
CASES = [(fault, place) for place in ("checkpoint", "metrics", "image") for fault in disks.FAULTS]


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """What a run has that met no fault."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert server.run(folder, *WORDS) == 0
    (run,) = runs_in(folder)
    return steps(run), state(run)


def told(text: str, fault: str, place: str, size: int) -> bool:
    """Whether a line names the file, why it cannot be written, how many bytes that takes and how many there are."""
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


def kept(server, cwd, whole, fault, place) -> bool | None:
    """Whether a run that meets a fault keeps the promise; None where this machine cannot have it."""
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
        and told(report["text"], fault, place, report["size"])
        and not process.err
        and report["left"] == []
        and report["checkpoints"]["last"] == step
        and report["status"]
        and report["again"] == 0
        and same(steps(run), whole[0])
        and same(state(run), whole[1])
    )


def test_a_disk_that_takes_no_more(server, whole, tmp_path, count, promise):
    chosen = CASES[:: 1 + 4 * (count(10) == 1)]  # three, of different faults and places, in a plain run
    seen = {case: kept(server, tmp_path / "-".join(case), whole, *case) for case in chosen}
    possible = [case for case in chosen if seen[case] is not None]
    promise(
        6,
        "disk full, limit, quota, read-only, in checkpoint, metrics, image: told, nothing lost, resumed",
        f"{sum(seen[case] for case in possible)} of {len(possible)}",
    )
    assert [case for case in possible if not seen[case]] == []
    assert possible == chosen or os.geteuid()  # only root mounts disks


def test_tensorboards_thread_prints_no_traceback(server, tmp_path):
    words = [word.replace("tensorboard=false", "tensorboard=true") for word in WORDS]
    process = server.start(tmp_path, *words, DISK=json.dumps({"fault": "quota", "place": "board"}))
    assert process.wait() == 0, process.err
    report = json.loads(process.out.splitlines()[-1])
    assert re.match(r"\S*/tb: cannot be written \(Disk quota exceeded\): [\d,]+ free; the same", report["text"])
    assert report["code"] == 1 and report["again"] == 0 and not process.err


def test_a_first_save_that_fails(tmp_path, monkeypatch):
    """Then there is nothing to go on from, and the line says so."""
    from inprocess import flowtrain

    from flowtrain.cli.exit_codes import WorkerError

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkerError, match=r"best\.pt: cannot be written .*; nothing was saved yet$"):
        flowtrain(tmp_path, *WORDS)
