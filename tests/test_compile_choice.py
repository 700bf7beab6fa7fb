"""compile=auto: what it measures, keeps and decides, and that a run goes on where compilation fails."""

import json
import math
import pickle
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from inprocess import flowtrain
from torch._dynamo.backends import registry
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from flowtrain.engine import threads
from flowtrain.engine.budget import Budget
from flowtrain.engine.compile_gain import Gain, Known, measure
from flowtrain.engine.compiling import compile_flow, use_cache
from flowtrain.errors import FlowtrainError
from flowtrain.flows import maf
from flowtrain.runtime import checkpoint, environment
from flowtrain.training import background, compilation, compile_later, late_choice
from flowtrain.training.background import BackgroundProcess
from flowtrain.training.late_choice import LateChoice, RepeatedChoice
from flowtrain.training.recorded import Recorded

TINY = ["model=maf", "model.steps=1", "model.hidden=8", "dataset=moons", "dataset.rows=2000", "batch_size=64"]
TINY += ["logger=none", "report=false", "trainer.sample_every=null", "trainer.val_examples=16", "threads=1"]
FAST, SLOW = Gain(1.0, 0.5, 0.5, 1), Gain(1.0, 2.0, 0.5, 1)  # seconds


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the user, and graphs that run as they are: a C++ compiler takes long."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch sets it where the user does not
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "get_default_backend", lambda: "aot_eager")
    torch._dynamo.reset()
    yield tmp_path / "cache" / "flowtrain" / "inductor"
    torch._dynamo.reset()


@pytest.fixture
def known(monkeypatch):
    """``known(gain)``: from now on that is known of every flow."""
    return lambda found: monkeypatch.setattr(Known, "read", lambda self: found)


def train(folder, *words):
    assert flowtrain(folder, "train", *TINY, "hydra.run.dir=run", *words) == 0
    return json.loads((folder / "run" / "summary.json").read_text())


def log_of(folder):
    return (folder / "run" / "train.log").read_text()


def weights(folder):
    return checkpoint.read(folder / "run" / "checkpoints" / "last.pt")["model"]


def test_a_compilation_repays_where_the_steps_that_are_left_save_more_than_it_takes():
    gain = Gain(eager=0.02, compiled=0.004, compiling=6.0, threads=2)
    assert gain.repays(Budget(1500, None)) and not gain.repays(Budget(400, None))
    assert not gain.repays(Budget(1500, None), step=1100)
    assert gain.repays(Budget(None, 1.0)) and not gain.repays(Budget(None, 0.1))
    assert not gain.repays(Budget(None, 1.0), seconds=55) and not gain.repays(Budget(1500, 0.1))
    assert not Gain(0.06, 0.07, 0.0, 1).repays(Budget(10**6, None))


def test_a_users_runs_share_one_cache(cache, monkeypatch):
    assert use_cache() == cache and cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert str(use_cache()) == "/elsewhere"


def test_a_gain_is_known_for_one_flow_batch_and_setting():
    flow, other, x = maf((2,), hidden=8), maf((2,), hidden=9), torch.zeros(4, 2)
    Known(flow, x, "float32").write(FAST)
    assert Known(maf((2,), hidden=8), x, "float32").read() == FAST  # whatever the weights
    for unknown in (Known(other, x, "float32"), Known(flow, x[:3], "float32"), Known(flow, x, "bfloat16")):
        assert unknown.read() is None
    Known(flow, x, "float32").write("no compiler")
    assert Known(flow, x, "float32").read() == "no compiler"
    Known(flow, x, "float32").file.write_text("{")
    assert Known(flow, x, "float32").read() is None


def test_measuring_leaves_the_flow_compiled_and_says_what_it_took():
    flow, x = maf((2,), hidden=8), torch.randn(8, 2)
    compilation, gain = measure(flow.train(), lambda: flow(x).mean().backward(), whole=True, threads=[1])
    assert compilation.graphs == 1 and min(gain.eager, gain.compiled) > 0 and gain.threads == 1
    assert gain.compiling > gain.compiled


def test_only_a_gain_that_repays_compiles_and_the_choice_is_recorded(tmp_path, known):
    known(FAST)
    assert train(tmp_path, "max_steps=4")["compiled"] and "compile=auto: compiled: measured here" in log_of(tmp_path)
    assert "compiled: the whole flow as" in log_of(tmp_path)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["compiled"]
    state = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["compilation"] == {
        "compiled": True,
        "since": 0,
        "gain": {"eager": 1.0, "compiled": 0.5, "compiling": 0.5, "threads": 1},
    }
    for gain in (SLOW, Gain(1.0, 0.5, 1000.0, 1), "no compiler"):
        known(gain)
        (tmp_path / str(gain)).mkdir()
        assert not train(tmp_path / str(gain), "max_steps=4")["compiled"]
        assert "compile=auto: not compiled: " in log_of(tmp_path / str(gain))
    known(FAST)
    assert not train(tmp_path / str(SLOW), "max_steps=4", "deterministic=true", "hydra.run.dir=other")["compiled"]


@pytest.mark.parametrize("first", [FAST, SLOW])
def test_a_resumed_run_repeats_the_choice_to_the_bit(first, tmp_path, known):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    known(first)
    train(whole, "max_steps=6", "scheduler=constant")
    train(parts, "max_steps=3", "scheduler=constant")
    known(SLOW if first == FAST else FAST)
    assert flowtrain(parts, "train", "resume=run", "max_steps=6") == 0
    assert json.loads((parts / "run" / "summary.json").read_text())["compiled"] == (first == FAST)
    assert all(map(torch.equal, weights(whole).values(), weights(parts).values()))


def test_compiled_and_eager_runs_agree_and_nothing_compiles_anew(tmp_path):
    """Over two epochs, whose last batches are not full, with validation, images and layer statistics."""
    words = "max_steps=60", "trainer.val_every=20", "trainer.sample_every=30", "trainer.layer_statistics=true"
    for name in ("true", "false"):
        (tmp_path / name).mkdir()
        assert train(tmp_path / name, *words, f"compile={name}")["compiled"] == (name == "true")
    rows = [json.loads(line) for line in (tmp_path / "true/run/metrics.jsonl").read_text().splitlines()]
    assert [row["train/recompiles"] for row in rows if "train/recompiles" in row] == [0, 0, 0]
    assert "compiled: the whole flow as 1 graph, in" in log_of(tmp_path / "true")
    torch.testing.assert_close(weights(tmp_path / "true"), weights(tmp_path / "false"), atol=1e-3, rtol=1e-3)


def broken(graph, inputs):
    def fail(*_):
        raise RuntimeError("no backward\nat all")

    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, _inputs: graph.forward, bw_compiler=fail)(graph, inputs)


def test_where_a_region_fails_in_its_first_step_auto_trains_without(tmp_path, known, monkeypatch):
    monkeypatch.setattr("flowtrain.engine.compiling._try", lambda region: None)  # the toy function works
    monkeypatch.setattr(registry, "get_default_backend", lambda: broken)
    known(FAST)
    assert not train(tmp_path, "max_steps=4")["compiled"]
    assert log_of(tmp_path).count("WARNING") == 1 and "compile=auto: trains without: " in log_of(tmp_path)
    assert "no backward" in log_of(tmp_path)
    with pytest.raises(FlowtrainError, match=r"^compile=true: torch.compile does not work here \(.*no backward.*\)"):
        flowtrain(tmp_path, "train", *TINY, "max_steps=4", "compile=true")


def test_an_error_of_the_flow_itself_is_not_the_compilers():
    flow, x = maf((2,), hidden=8).train(), torch.randn(8, 3)
    from flowtrain.engine.compiling import compile_and_try

    with pytest.raises(ValueError, match="this flow takes"):
        compile_and_try(flow, lambda: flow(x).mean().backward())
    assert flow._compiled_call_impl is None


def test_a_long_run_tries_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "LONG", 0.0)
    monkeypatch.setattr(compilation, "MANY", 3)
    summary = train(tmp_path, "max_steps=4")
    gain = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")["compilation"]["gain"]
    assert summary["compiled"] == (gain["compiled"] < gain["eager"]) and "compile=auto: a gradient takes" in log_of(
        tmp_path
    )


PROCESS = SimpleNamespace(pid=7, poll=lambda: None)


def tf32():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def soon(monkeypatch):
    """No run is too short to be compiled for, and each step looks whether the gain is known."""
    monkeypatch.setattr(late_choice, "WORTH", 0.0)
    monkeypatch.setattr(late_choice, "EVERY", 0.0)


@pytest.fixture
def known_after(soon, monkeypatch):
    """``known_after(step, gain)``: a process beside the next run notes that gain while the run takes this step."""
    monkeypatch.setattr(BackgroundProcess, "start", lambda self: None)

    def forget_until(step, gain):
        reads = iter([None] * step)  # one at the start, and one after each step
        monkeypatch.setattr(Known, "read", lambda self: next(reads, gain))

    return forget_until


def loose(graph, _inputs):
    """A backend whose code rounds otherwise."""
    return lambda *args: [1.001 * one for one in graph(*args)]


def test_a_run_of_some_seconds_is_compiled_for_beside_it(tmp_path, cache, soon, two_threads, monkeypatch):
    """The job that a run writes is what its process reads; here in this process, in which nothing runs at once."""
    jobs, words = [], ["train", *TINY, "threads=auto", "max_steps=20"]

    monkeypatch.setattr(background, "start_process", lambda job, lock: jobs.append(job) or PROCESS)
    state = two_threads(tmp_path, *words, "hydra.run.dir=run")
    assert state["compilation"] == {"compiled": False, "since": 0, "gain": None, "open": True}
    assert "compile=auto: process 7 compiles this flow beside the run" in log_of(tmp_path)
    assert "compile=auto: process 7 is still at work" in log_of(tmp_path)
    (job,) = jobs
    assert pickle.loads(job.read_bytes()).threads == threads.halvings(state["threads"]["chosen"])
    switches = []  # by which torch's cache knows code, as the run sets them and not as torch does
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(
        compile_later, "measure", lambda *args, **keys: switches.append(tf32()) or measure(*args, **keys)
    )
    compile_later.run(pickle.loads(job.read_bytes()))
    assert switches == [(False, False)]
    job.unlink()
    (found,) = cache.glob("flowtrain/*.json")
    assert {*json.loads(found.read_text())} == {"eager", "compiled", "compiling", "threads"}
    two_threads(tmp_path, *words, "hydra.run.dir=again")
    log = (tmp_path / "again" / "train.log").read_text()
    assert "measured here before" in log  # of the same flow in the same setting


def test_a_run_is_compiled_once_its_process_has_measured_that_it_repays(tmp_path, soon, monkeypatch):
    """The process does its job at once, in this process."""

    def start_process(job, lock):
        compile_later.run(pickle.loads(job.read_bytes()))
        torch.compiler.reset()
        return PROCESS

    monkeypatch.setattr(background, "start_process", start_process)
    monkeypatch.setattr(Gain, "repays", lambda *args: True)
    assert train(tmp_path, "max_steps=20", "trainer.log_every=1")["compiled"]
    step = late_choice.COUNTED + 1  # the process is started after one step less
    log = log_of(tmp_path)
    assert f"compile=auto: compiled: measured here after step {step}, a gradient takes " in log
    assert log.count("compiled: the whole flow as 1 graph, in") == log.count("compiles this flow beside the run") == 1
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["compiled"]
    choice = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")["compilation"]
    assert choice["compiled"] and choice["since"] == step
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/recompiles" in row] == [*range(step, 21)]
    assert {row.get("train/recompiles", 0) for row in rows} == {0}


def test_a_short_run_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "start_process", None)
    monkeypatch.setattr(late_choice, "EVERY", 0.0)
    assert not train(tmp_path, "max_steps=40")["compiled"]


def test_a_run_looks_once_a_second_and_starts_a_process_when_it_can(monkeypatch):
    """Another run's process is at work at first; it ends without a result."""
    clock, looks, starts = [100.0], [], []
    monkeypatch.setattr(late_choice, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    known = SimpleNamespace(read=lambda: looks.append(clock[0]))
    process = SimpleNamespace(start=lambda: starts.append(clock[0]))
    choice = LateChoice(known, Budget(200, None), lambda gain: None, process)
    for step in range(1, 101):
        clock[0] += 0.25
        choice.after_step(step, 0.25 * step, 0.25)
    assert looks == [100.25 + second for second in range(25)]
    assert starts == [102.25 + second for second in range(23)]
    choice = LateChoice(known, Budget(157, None), lambda gain: None, process)
    for step in range(99, 158):  # 58 steps take less than 15 seconds
        clock[0] += 0.25
        choice.after_step(step, 0.25 * step, 0.25)
    assert len(starts) == 23


def test_what_does_not_repay_for_the_steps_that_are_left_leaves_a_run_as_it_is(tmp_path, known_after):
    known_after(7, Gain(1.0, 0.5, 2.0, 1))
    assert not train(tmp_path, "max_steps=10")["compiled"]
    assert "compile=auto: not compiled: measured here after step 7, a gradient takes" in log_of(tmp_path)
    (tmp_path / "earlier").mkdir()
    known_after(5, Gain(1.0, 0.5, 2.0, 1))
    assert train(tmp_path / "earlier", "max_steps=10")["compiled"]
    assert "compile=auto: compiled: measured here after step 5, a gradient" in log_of(tmp_path / "earlier")


def test_a_failure_between_two_steps_is_a_warning_and_changes_nothing(tmp_path, known_after, monkeypatch):
    monkeypatch.setattr("flowtrain.engine.compiling._try", lambda region: None)
    monkeypatch.setattr(registry, "get_default_backend", lambda: broken)
    (tmp_path / "eager").mkdir()
    known_after(3, FAST)
    words = ["max_steps=8"]  # with batch normalization, whose moments a gradient changes
    assert not train(tmp_path, *words)["compiled"]
    assert log_of(tmp_path).count("WARNING") == log_of(tmp_path).count("compile=auto: trains without: ") == 1
    train(tmp_path / "eager", *words, "compile=false")
    assert all(map(torch.equal, weights(tmp_path).values(), weights(tmp_path / "eager").values()))


@pytest.fixture
def two_threads(monkeypatch):
    """``two_threads(command)`` runs a command that chooses between two numbers of threads, in one turn of two steps
    each; one thread is the faster one, whatever the clock says."""
    before, after_step = torch.get_num_threads(), threads.Threads.after_step
    for name, value in {"ROUNDS": 1, "KEPT": 1, "SLOW": math.inf}.items():
        monkeypatch.setattr(threads, name, value)
    monkeypatch.setattr(threads.Threads, "after_step", lambda self, seconds: after_step(self, self.turns[-1]))

    def run(folder, *words):
        torch.set_num_threads(2)
        assert flowtrain(folder, *words) == 0
        return checkpoint.read(folder / words[-1].partition("=")[2] / "checkpoints" / "last.pt")

    yield run
    torch.set_num_threads(before)


def test_a_run_that_was_compiled_on_its_way_is_resumed_and_repeated_to_the_bit(
    tmp_path, known_after, two_threads, monkeypatch
):
    monkeypatch.setattr(registry, "get_default_backend", lambda: loose)
    monkeypatch.setattr(environment, "_commit", lambda: "0123456789abcdef")  # without changes, whatever it is
    words = ["train", *TINY, "threads=auto", "scheduler=constant", "max_steps=20"]
    known_after(4, FAST)
    whole = two_threads(tmp_path, *words, "hydra.run.dir=whole")
    assert whole["compilation"] == {"compiled": True, "since": 7, "gain": asdict(FAST)}  # three steps before it looks
    assert whole["threads"]["turns"] == [2, 1, 1]  # the last one is of the chosen number
    known_after(4, FAST)
    two_threads(tmp_path, *words, "max_steps=10", "hydra.run.dir=parts")
    monkeypatch.setattr(Known, "read", lambda self: SLOW)
    two_threads(tmp_path, "train", "max_steps=12", "resume=parts")
    parts = two_threads(tmp_path, "train", "max_steps=20", "resume=parts")
    again = [two_threads(tmp_path, "rerun", name, f"hydra.run.dir={name}2") for name in ("whole", "parts")]
    log = (tmp_path / "parts2" / "train.log").read_text()
    assert "nothing differs" in log and "compile=auto: compiled after step 7, as before" in log
    for one in (parts, *again):
        assert one["compilation"] == whole["compilation"] and one["threads"]["turns"] == whole["threads"]["turns"]
        assert all(map(torch.equal, one["model"].values(), whole["model"].values()))
    other = two_threads(tmp_path, "rerun", "whole", "max_steps=2", "memory=checkpoint", "hydra.run.dir=other")
    assert other["compilation"] == whole["compilation"] | {"since": 0}  # what has no late choice has one at its start
    eager = two_threads(tmp_path, *words, "compile=false", "hydra.run.dir=eager")
    assert not all(map(torch.equal, eager["model"].values(), whole["model"].values()))


def test_a_repetition_that_is_interrupted_before_it_compiles_is_recorded_as_one_that_will():
    choice = RepeatedChoice(FAST, 3, lambda gain: None)
    choice.after_step(2)
    state = {"compilation": choice.state_dict(), "threads": {"turns": [2, 1, 2]}}
    assert Recorded.of(state) == Recorded((2, 1, 2), True, 3, FAST)
    choice.after_step(3)
    assert not choice.state_dict()["compiled"]  # it failed


def test_a_run_that_stopped_before_it_could_choose_does_when_it_goes_on(tmp_path, known_after):
    known_after(99, FAST)
    assert not train(tmp_path, "max_steps=3")["compiled"]
    state = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["compilation"] == {"compiled": False, "since": 0, "gain": None, "open": True}
    before = Recorded.of(state)
    assert before.compiled is False  # as a repetition of these steps must be
    assert before.resumed().compiled is None and Recorded(compiled=False).resumed().compiled is False
    known_after(3, FAST)
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=9") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["compiled"]
    choice = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")["compilation"]
    assert choice["compiled"] and choice["since"] == 6 and "open" not in choice


def test_records_of_older_versions_and_damaged_ones_are_read():
    older = {"compilation": {"compiled": True, "gain": {"eager": 1.0, "compiled": 0.5, "compiling": 0.5, "threads": 1}}}
    assert Recorded.of(older) == Recorded((), True, 0, FAST)
    assert Recorded.of({"compilation": None, "threads": {"turns": ["2"]}}) == Recorded.of({}) == Recorded()


def test_one_process_at_a_time_measures(cache):
    known = Known(maf((2,), hidden=8), torch.zeros(4, 2))
    with known.lock() as lock, known.lock() as second:
        assert lock is not None and second is None
    with known.lock() as lock:
        assert lock is not None


def test_a_deep_flow_is_compiled_by_regions(monkeypatch):
    monkeypatch.setattr("flowtrain.engine.compiling.DEEP", 2)
    assert compile_flow(maf((2,), hidden=8, steps=3)).regions == 3
    assert compile_flow(maf((2,), hidden=8, steps=2)).modules[0].shape == (2,)


def test_a_dry_run_says_what_is_known_and_compiles_nothing(tmp_path, known, capfd):
    assert flowtrain(tmp_path, "train", *TINY, "max_steps=4", "dry_run=true") == 0
    assert "compile=true" in (out := capfd.readouterr().out) and "it takes minutes to compile a flow anew" in out
    known(SLOW)
    assert flowtrain(tmp_path, "train", *TINY, "max_steps=4", "dry_run=true") == 0
    assert "measured before: a gradient takes 1000.0 ms, compiled 2000.0 ms" in capfd.readouterr().out
