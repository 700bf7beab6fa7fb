"""batch_size=auto of images: the throughput's knee on a CPU, what fits on a GPU; no other effect on the run."""

import json
from dataclasses import replace

import pytest
import torch
from composed import configuration

from flowtrain import train
from flowtrain.engine.batch_search import knee, largest_that_fits, sizes_between
from flowtrain.runtime import checkpoint
from flowtrain.training import batch_size

SIZES = [16, 32, 64, 128, 256]
TINY = ["model=glow", "model.levels=1", "model.steps=1", "model.hidden=8", "dataset=digits", "logger=none"]
TINY += ["trainer.sample_every=null", "trainer.sample_n=1", "trainer.val_examples=16", "compile=false"]


class Machine:
    """Steps that take ``overhead`` seconds and ``each`` more an example, and need bytes likewise."""

    def __init__(self, overhead=0.0, each=1.0, base=0, row=1, most=float("inf")):
        self.overhead, self.each, self.base, self.row, self.most = overhead, each, base, row, most
        self.sizes, self.now = [], 0.0

    def __call__(self, size):
        self.sizes.append(size)
        if self.base + self.row * size > self.most:
            raise torch.OutOfMemoryError
        seconds = self.overhead + self.each * size
        self.now += seconds
        return seconds, self.base + self.row * size

    def clock(self):
        return self.now


@pytest.mark.parametrize(
    ("overhead", "chosen", "measured"),
    [
        (0, 16, [16, 32, 64]),  # two doublings without a gain end the search
        (4, 32, [16, 32, 64, 128]),  # 0.89 of the best rate with 32, 0.94 with 64
        (100, 256, SIZES),  # every doubling pays
    ],
)
def test_on_a_cpu_the_smallest_size_with_nearly_the_best_throughput_is_chosen(overhead, chosen, measured):
    machine = Machine(overhead)
    size, trials = knee(machine, SIZES, room=1e9, seconds=1e9, clock=machine.clock)
    assert [trial.size for trial in trials] == machine.sizes == measured
    best = max(trial.rate for trial in trials)
    assert size == chosen and size == min(trial.size for trial in trials if 1.1 * trial.rate >= best)


def test_the_search_ends_in_time_and_before_memory_is_full():
    machine = Machine(overhead=1000)
    assert knee(machine, SIZES, room=1e9, seconds=4000, clock=machine.clock)[0] == 32  # a third could take 2064 more
    assert machine.sizes == [16, 32]
    assert knee(Machine(100), SIZES, room=100, seconds=1e9)[0] == 64
    assert knee(Machine(100), SIZES, room=0, seconds=0)[0] == 16


@pytest.mark.parametrize(
    ("room", "row", "base", "chosen"),
    [(1000, 1, 0, 512), (300, 1, 0, 256), (256, 1, 1, 128), (40, 1, 0, 32), (20, 1, 0, 16), (7, 1, 0, 4), (1, 1, 0, 1)],
)
def test_on_a_gpu_the_largest_size_that_fits_is_chosen(room, row, base, chosen):
    machine = Machine(base=base, row=row, most=room)
    sizes = sizes_between(1, 512, 1)
    size, trials = largest_that_fits(machine, sizes, room)
    assert size == chosen and chosen in [trial.size for trial in trials]
    assert len(machine.sizes) == len({*machine.sizes}) <= 7


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")])
def test_a_size_that_the_line_allows_but_the_gpu_does_not_is_halved(error):
    class Bent(Machine):
        def __call__(self, size):
            seconds, _ = super().__call__(size)
            if size > 64:
                raise error
            return seconds, size

    machine = Bent()
    assert largest_that_fits(machine, sizes_between(1, 512, 1), room=1e9)[0] == 64
    assert machine.sizes == [16, 32, 512, 256, 128, 64]
    with pytest.raises(torch.OutOfMemoryError, match="a step with 1 examples"):
        largest_that_fits(Machine(most=0), [1, 2, 4], room=1e9)
    error = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        largest_that_fits(Bent(), sizes_between(1, 512, 1), room=1e9)


def test_large_batches_leave_steps_in_an_epoch():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for rows, most in ((100, 64), (1259, 64), (2048, 128), (50_000, 256)):
        assert batch_size._sizes(rows, 1, cpu)[-1] == most
    assert batch_size._sizes(50_000, 1, gpu) == [2**k for k in range(10)]
    assert batch_size._sizes(10, 1, cpu) == []


def test_sizes_are_shared_out_evenly():
    assert sizes_between(16, 256, 6) == [24, 48, 96, 192]
    assert sizes_between(16, 256, 300) == []


@pytest.mark.parametrize(
    ("words", "measures"),
    [
        (["max_steps=500"], True),
        (["max_steps=499"], False),
        (["max_steps=null", "max_minutes=2"], True),
        (["max_steps=null", "max_minutes=1.9"], False),
        (["max_steps=null", "trainer.max_epochs=30"], True),  # 19 steps of 64 each
        (["max_steps=null", "trainer.max_epochs=20"], False),
        (["max_steps=5000", "deterministic=true"], False),
    ],
)
def test_only_a_run_that_is_long_enough_measures(words, measures):
    assert batch_size.measures(configuration(*TINY, *words), rows=1259) == measures


def trained(config, folder):
    folder.mkdir(exist_ok=True)
    return train.main(config, str(folder))


def weights(run):
    return checkpoint.read(run / "checkpoints/last.pt")["model"]


def test_measuring_does_not_change_the_run_and_resume_keeps_the_size(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "flowtrain")
    monkeypatch.setattr(batch_size, "STEPS", 2)
    config = replace(configuration(*TINY, "max_steps=3"), threads=torch.get_num_threads())
    torch.manual_seed(7)
    chosen = trained(config, tmp_path / "auto")["batch_size"]
    assert chosen in SIZES
    (line,) = [text for text in caplog.messages if text.startswith("batch_size=auto")]
    assert line.startswith(f"batch_size=auto: {chosen}; examples a second: ") and line.endswith(
        "(batch_size=N sets it)"
    )
    assert f" with {chosen}" in line
    assert json.loads((tmp_path / "auto/environment.json").read_text())["batch_size"] == chosen
    trained(replace(config, batch_size=chosen), tmp_path / "given")
    first, second = weights(tmp_path / "auto"), weights(tmp_path / "given")
    assert all(torch.equal(first[name], second[name]) for name in first)

    monkeypatch.setattr(batch_size, "knee", None)  # resuming measures nothing
    last = tmp_path / "auto/checkpoints/last.pt"
    assert checkpoint.read(last)["loader"]["batch_size"] == chosen
    resumed = trained(replace(config, resume=str(last), max_steps=4), tmp_path / "auto")
    assert resumed["batch_size"] == chosen and resumed["steps"] == 4


def test_no_clock_decides_in_a_short_or_deterministic_run(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "knee", None)
    assert trained(configuration(*TINY, "max_steps=1"), tmp_path / "short")["batch_size"] == 64
