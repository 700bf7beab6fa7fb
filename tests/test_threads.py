"""Torch's threads: shared by the jobs of a sweep, chosen by a small flow's first steps, given by threads=N."""

import json
import sys

import pytest
import torch
from composed import configuration
from inprocess import flowtrain
from omegaconf import OmegaConf

from flowtrain.cli import jobs, launcher
from flowtrain.engine.threads import KEPT, ROUNDS, Threads, halvings
from flowtrain.runtime import distributed
from flowtrain.training.setup import chosen_threads

TURN = 1 + KEPT


class Steps:
    """Steps of a run whose duration depends on the number of threads."""

    def __init__(self, numbers, seconds):
        self.now, self.used, self.seconds = None, [], seconds
        self.threads = Threads(numbers, self.use)
        self.threads.start()

    def use(self, number):
        self.now = number

    def run(self, count):
        for _ in range(count):
            self.used.append(self.now)
            self.threads.after_step(self.seconds[self.now])
        return self


@pytest.fixture
def threads():
    """Restores the number of threads, which a run sets for its process."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize(("fast", "slow"), [(1, 2), (2, 1)])
def test_the_fastest_number_is_kept_after_its_turns(fast, slow, caplog):
    caplog.set_level("INFO", "flowtrain")
    steps = Steps([2, 1], {fast: 0.10, slow: 0.12}).run(100)
    trial = ([2] * TURN + [1] * TURN) * ROUNDS
    assert steps.used == trial + [fast] * (100 - len(trial)) and steps.threads.chosen == fast
    (line,) = caplog.messages
    assert line == f"threads: {fast} from now on; a step took {1000 * steps.seconds[2]:.1f} ms with 2, " + (
        f"{1000 * steps.seconds[1]:.1f} ms with 1 (threads=N sets it)"
    )


def test_a_flow_that_needs_all_cores_tries_half_of_them_once():
    steps = Steps(halvings(64), {number: 1 / number for number in halvings(64)}).run(50)
    assert steps.used == [64] * TURN + [32] * TURN + [64] * (50 - 2 * TURN)


def test_a_number_between_is_found():
    seconds = {8: 0.9, 4: 0.5, 2: 0.4, 1: 0.7}
    steps = Steps(halvings(8), seconds).run(200)
    assert steps.threads.chosen == 2
    assert steps.used.count(8) == TURN and steps.used.count(1) == TURN  # too slow for a second turn


def test_an_outlier_does_not_decide():
    steps = Steps([2, 1], {2: 0.11, 1: 0.10})
    for step in range(2 * TURN * ROUNDS):
        steps.threads.after_step(9.0 if step in (5, 13) else steps.seconds[steps.now])
    assert steps.threads.chosen == 1


def test_a_number_has_more_turns_where_steps_are_quick():
    steps = Steps([2, 1], {2: 0.004, 1: 0.005}).run(200)
    trial = ([2] * 4 * TURN + [1] * 3 * TURN) * ROUNDS  # 64 and 60 milliseconds
    assert steps.used == trial + [2] * (200 - len(trial)) and steps.threads.chosen == 2
    assert [number for number in steps.threads.turns for _ in range(TURN)] == trial + [2] * TURN


@pytest.mark.parametrize("done", [3, TURN + 2, 2 * TURN * ROUNDS, 60])
def test_a_resumed_run_goes_on_as_if_it_had_not_ended(done):
    seconds = {2: 0.011, 1: 0.010}
    whole, first, second = (Steps([2, 1], seconds) for _ in range(3))
    second.threads.load_state_dict(first.run(done).threads.state_dict())
    second.threads.start()
    assert first.used + second.run(70 - done).used == whole.run(70).used


def test_a_single_number_is_kept_and_a_recorded_one_fits_the_share():
    state = Steps([4, 2, 1], {4: 1.0, 2: 2.0, 1: 4.0}).run(50).threads.state_dict()
    for numbers, chosen in (([3], 3), ([2, 1], 2), ([8, 4, 2, 1], 4)):
        resumed = Threads(numbers)
        resumed.load_state_dict(state)
        assert resumed.chosen == chosen


def test_jobs_side_by_side_and_their_processes_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(distributed, "cores", lambda: 12)
    for count, side_by_side, share in ((1, 1, "12"), (4, 1, "3"), (1, 2, "6"), (2, 3, "2"), (5, 4, "1")):
        assert launcher._environment(0, count, "folder", side_by_side)["OMP_NUM_THREADS"] == share
    for n_jobs, side_by_side in ((2, 2), (-1, 12), (-2, 11), (None, 1), ("absent", 1)):
        node = {"launcher": {} if n_jobs == "absent" else {"n_jobs": n_jobs}}
        hydra = OmegaConf.create(node, flags={"struct": True})
        assert jobs._side_by_side(hydra) == side_by_side
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # of the user
    assert launcher._environment(0, 4, "folder", 1)["OMP_NUM_THREADS"] == "5"


TINY = [
    "model=maf",
    "dataset=moons",
    "dataset.rows=2000",
    "model.hidden=8",
    "logger=none",
    "model.steps=1",
    "trainer.sample_every=null",
]
TINY += ["trainer.val_examples=16", "batch_size=8"]


def test_a_job_of_a_sweep_gets_its_share(tmp_path, monkeypatch):
    """Hydra's own launcher, told that two jobs run at once."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs, "_side_by_side", lambda hydra: 10**6)
    monkeypatch.setattr(sys, "argv", ["flowtrain"])
    assert flowtrain(tmp_path, "train", "--multirun", *TINY, "max_steps=2", "seed=1") == 0
    (summary,) = tmp_path.glob("outputs/sweeps/*/*/summary.json")
    assert json.loads(summary.read_text())["threads"] == 1


def test_a_run_chooses_and_records_its_threads_and_keeps_them_when_it_resumes(tmp_path, threads, monkeypatch):
    monkeypatch.setattr("flowtrain.engine.threads.LEAST", 0.0)
    torch.set_num_threads(2)
    words = [*TINY, "max_steps=26", "trainer.val_every=100", "trainer.save_every=100"]
    assert flowtrain(tmp_path, "train", *words) == 0
    (run,) = tmp_path.glob("outputs/*/*")
    chosen = json.loads((run / "summary.json").read_text())["threads"]
    assert chosen in (1, 2) and json.loads((run / "environment.json").read_text())["threads"] == chosen
    assert f"threads: {chosen} from now on; a step took " in (run / "train.log").read_text()
    torch.set_num_threads(2)
    assert flowtrain(tmp_path, "train", *words, "resume=true", "max_steps=28") == 0
    assert json.loads((run / "summary.json").read_text())["threads"] == chosen
    assert (run / "train.log").read_text().count("threads: ") == 1


def test_threads_are_set_and_recorded(tmp_path, threads):
    assert flowtrain(tmp_path, "train", *TINY, "max_steps=2", "threads=3") == 0
    (run,) = tmp_path.glob("outputs/*/*")
    assert json.loads((run / "summary.json").read_text())["threads"] == 3 == torch.get_num_threads()
    assert json.loads((run / "environment.json").read_text())["threads"] == 3
    assert flowtrain(tmp_path, "train", f"resume={run}", "max_steps=3", "threads=2") == 0
    assert json.loads((run / "summary.json").read_text())["threads"] == 2
    assert flowtrain(tmp_path, "eval", f"ckpt={run}", "examples=8", "threads=1") == 0
    assert torch.get_num_threads() == 1


def test_only_a_process_that_trains_alone_on_the_cpu_measures(threads, monkeypatch):
    torch.set_num_threads(2)
    cpu = torch.device("cpu")
    assert chosen_threads(configuration(), cpu).numbers == [2, 1]
    for word in ("deterministic=true", "threads=2"):
        assert chosen_threads(configuration(word), cpu).numbers == [2]
    assert chosen_threads(configuration(), torch.device("cuda")).numbers == [2]
    assert chosen_threads(configuration(), cpu, compiled=True).numbers == [2]
    monkeypatch.setattr(distributed, "world", lambda: 2)
    assert chosen_threads(configuration(), cpu).numbers == [2]
