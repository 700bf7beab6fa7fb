"""The training loop on flows of a few parameters: state, averages, bad steps, signals, evaluation, checkpoints."""

import json
import math
import os
import pickle
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.bijections.bijection import Backpropagation
from flowtrain.data.batch import Batch
from flowtrain.engine import determinism
from flowtrain.engine import trainer as training
from flowtrain.engine.agreement import Agreed, agree
from flowtrain.engine.budget import Budget
from flowtrain.engine.ema import EMA
from flowtrain.engine.evaluate import evaluate
from flowtrain.engine.loggers import JsonLines, Logger, Loggers, NullLogger, ProgressLines, RunRecord
from flowtrain.engine.objectives import BitsPerDim, NatsPerRow, Objective, maximum_likelihood
from flowtrain.engine.optimizers import UNSHIELDED
from flowtrain.engine.previews import Previews
from flowtrain.engine.saving import Checkpoints
from flowtrain.engine.schedules import Constant, Cosine, Exponential, Linear, Steps, WarmUp
from flowtrain.engine.trainer import Trainer
from flowtrain.engine.validation import Validation
from flowtrain.engine.weights import Weights
from flowtrain.errors import FlowtrainError, Interrupted
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, global_batch
from flowtrain.runtime.files import WriteError
from flowtrain.runtime.seeds import generator

LEVELS, SHAPE, BATCH = 8, (6,), 16


def small_flow(dropout=0.2):
    torch.manual_seed(0)
    layers = {
        "dequantize": partial(b.Dequantize, grey_levels=LEVELS),
        "actnorm": b.ActNorm,
        "mixing": b.LULinear,
        "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=partial(nets.MLP, hidden=16, dropout=dropout)),
        "norm": b.BatchNorm,
    }
    return Flow(SHAPE, partial(b.Chain, layers=layers))


class Batches:
    """A loader of made-up integers, a function of the step as the real one is."""

    batch_size, steps_per_epoch = BATCH, 100

    def __init__(self, poison=()):
        self.poison = poison

    def batches(self, step=0):
        while True:
            x = torch.randint(0, LEVELS, (BATCH, *SHAPE), generator=generator(step)).cumsum(1).clamp(max=LEVELS - 1)
            yield Batch(torch.full(x.shape, math.nan) if step in self.poison else x)
            step += 1

    def examples(self, step):
        return [*range(step * BATCH, (step + 1) * BATCH)]

    def state_dict(self):
        return {"batch_size": BATCH}

    def load_state_dict(self, state):
        assert state == self.state_dict()


def config(**changes):
    trainer = dict(
        accumulate=1,
        clip=1.0,
        log_every=4,
        val_every=10,
        sample_every=1000,
        save_every=10,
        save_minutes=60,
        max_bad_steps=4,
        layer_statistics=False,
        rollback=None,
        profile=False,
    )
    return SimpleNamespace(seed=1, allow=[], trainer=SimpleNamespace(**{**trainer, **changes}))


def trainer(run_dir, loader=None, ema=0.9, flow=None, max_steps=30, max_minutes=None, patience=None, **changes):
    flow = flow or small_flow()
    test = next(Batches().batches(10_000)).x

    def evaluate_test(flow):
        return evaluate(flow, [(torch.arange(BATCH), test, None)], BATCH)

    return Trainer(
        flow,
        BitsPerDim(),
        loader or Batches(),
        torch.optim.Adam(flow.parameters(), 1e-2),
        config(**changes),
        budget=Budget(max_steps, max_minutes),
        schedule=WarmUp(Cosine(), 5),
        validation=Validation(evaluate_test, BitsPerDim(), patience),
        previews=Previews(lambda _flow: None),
        checkpoints=Checkpoints(run_dir, {"some": "config"}),
        loggers=Loggers(),
        ema=EMA(flow, ema) if ema else None,
    )


def same(a, b):
    """Two states equal bit for bit, whatever the clock said."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def lines(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("system/")} for row in rows]


def run(one, run_dir):
    one.loggers.loggers = [JsonLines()]
    one.loggers.open(RunRecord(run_dir, one.step, one.loggers.records, one.budget, "bits_per_dim", "bits/dim"))
    try:
        one.fit()
    finally:
        one.loggers.close()
    return one


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = run(trainer(tmp_path / "whole"), tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(self, step=0):
        for i, x in enumerate(Batches.batches(self, step), step):
            if i == 17:
                raise Killed
            yield x

    loader = type("Dying", (Batches,), {"batches": kill})()
    with pytest.raises(Killed):
        run(trainer(tmp_path / "parts", loader), tmp_path / "parts")
    resumed = trainer(tmp_path / "parts", flow=small_flow())
    resumed.load_state_dict(checkpoint.read(tmp_path / "parts/checkpoints/last.pt"))
    assert resumed.step == 10
    run(resumed, tmp_path / "parts")
    assert same(whole.state_dict(), resumed.state_dict())
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


@pytest.mark.parametrize("part", ["model", "ema", "optimizer", "step"])
def test_each_part_of_the_state_matters(tmp_path, part):
    one = trainer(tmp_path, max_steps=20)
    run(one, tmp_path)
    state = one.state_dict()
    fresh = trainer(tmp_path).state_dict()
    spoiled = trainer(tmp_path)
    spoiled.load_state_dict({**state, part: fresh[part]})
    good = trainer(tmp_path)
    good.load_state_dict(state)
    for each in (spoiled, good):
        run(each, tmp_path)
    assert not same(spoiled.state_dict(), good.state_dict())


def test_accumulated_parts_equal_the_whole_batch(tmp_path):
    flows = []
    for parts in (1, 4):
        layers = {
            "dequantize": partial(b.Dequantize, grey_levels=LEVELS),
            "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=partial(nets.MLP, hidden=16, dropout=0.3)),
        }
        torch.manual_seed(0)
        flow = Flow(SHAPE, partial(b.Chain, layers=layers))
        run(trainer(tmp_path, flow=flow, accumulate=parts, max_steps=5), tmp_path)
        flows.append(torch.cat([parameter.flatten() for parameter in flow.parameters()]))
    torch.testing.assert_close(*flows, atol=1e-5, rtol=1e-4)


def test_training_lowers_the_loss(tmp_path):
    one = run(trainer(tmp_path, max_steps=200), tmp_path)
    values = [row["train/bits_per_dim"] for row in lines(tmp_path) if "train/bits_per_dim" in row]
    assert values[-1] < values[0] - 0.3
    assert one.validation.best < math.log2(LEVELS)


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_bad_step_is_skipped_and_counted(tmp_path):
    one = trainer(tmp_path, Batches(poison=[3, 7]))
    run(one, tmp_path)
    assert (one.step, one.recovery.skipped, one.recovery.in_a_row) == (30, 2, 0)
    assert all(value.isfinite().all() for value in one.flow.state_dict().values())
    assert lines(tmp_path)[-2]["train/skipped_steps"] == 2


def test_too_many_bad_steps_stop_with_the_last_good_state_saved(tmp_path):
    one = trainer(tmp_path, Batches(poison=range(6, 99)))
    with pytest.raises(FlowtrainError, match=r"stopped at step 9: 4 steps in a row.*last\.pt"):
        run(one, tmp_path)
    saved = checkpoint.read(tmp_path / "checkpoints/last.pt")
    assert all(value.isfinite().all() for value in saved["model"].values())
    good = trainer(tmp_path, max_steps=30)
    for x in [next(Batches().batches(step)) for step in range(6)]:
        good.update(agree(*good.gradient(x), 0, 0.0))
        good.step += 1
    assert same(good.flow.state_dict(), saved["model"])


CONDITIONAL = {  # optimizers that leave out a step by themselves
    "adam": partial(torch.optim.Adam, amsgrad=True, fused=True),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
}


def optimized(run_dir, make, **changes):
    one = trainer(run_dir, Batches(poison=[0, 5, 6]), max_steps=9, **changes)
    one.weights.optimizer = make(one.flow.parameters(), lr=1e-2)
    return one


@pytest.mark.parametrize("rollback", [None, 0.5])
@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_bad_step_that_is_decided_on_the_device_changes_nothing(tmp_path, monkeypatch, name, rollback):
    """Weights, averages, the optimizer's state and the records are those of a run that reads before it steps."""
    (tmp_path / "device").mkdir()
    (tmp_path / "host").mkdir()
    changes = dict(rollback=rollback, max_bad_steps=2 if rollback else 4, save_every=3, log_every=1)
    there = optimized(tmp_path / "device", CONDITIONAL[name], **changes)
    there.weights.asynchronous = True  # as on a GPU
    run(there, tmp_path / "device")
    monkeypatch.setattr(Weights, "takes_condition", False)
    here = run(optimized(tmp_path / "host", CONDITIONAL[name], **changes), tmp_path / "host")
    assert here.recovery.skipped == 3 and here.recovery.rollbacks == (rollback is not None)
    assert same(there.state_dict(), here.state_dict())
    assert lines(tmp_path / "device") == lines(tmp_path / "host")
    assert all(value.isfinite().all() for value in there.flow.state_dict().values())


@pytest.mark.parametrize(
    ("make", "usual"), [(CONDITIONAL["adamw"], ["step", "read"]), (torch.optim.Adamax, ["read", "step"])]
)
def test_the_host_reads_after_the_step_of_an_optimizer_that_leaves_out_bad_ones(tmp_path, monkeypatch, make, usual):
    one, read, calls = optimized(tmp_path, make, rollback=0.5, save_every=7), Agreed.read, []
    one.weights.asynchronous = True  # as on a GPU
    monkeypatch.setattr(Agreed, "read", lambda agreed: calls[-1].append("read") or read(agreed))
    one.weights.optimizer.register_step_pre_hook(lambda *_: calls[-1].append("step"))
    for batch, _ in zip(one.loader.batches(), range(9)):
        calls.append([])
        one.update(agree(*one.gradient(batch), 0, 0.0))
        one.step += 1
    first, state, *others = calls
    assert first == ["read"] and state == ["read", "step"]  # a bad one, and that which creates the optimizer's state
    late = usual[0] == "step"
    bad = usual if late else ["read"]
    assert others == [usual, usual, usual, bad, bad, usual, ["read", "step"]]  # the last one after a copy
    assert one.recovery.copy["step"] == 8 and one.recovery.skipped == 3


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_its_code(tmp_path, signum):
    class Signalled(Batches):
        def batches(self, step=0):
            for i, x in enumerate(super().batches(step), step):
                if i == 5:
                    os.kill(os.getpid(), signum)
                yield x

    before = signal.getsignal(signum)  # a shell's background job ignores SIGINT from the start
    one = trainer(tmp_path, Signalled())
    with pytest.raises(Interrupted) as caught:
        run(one, tmp_path)
    assert caught.value.exit_code == {signal.SIGINT: 130}.get(signum, 143)
    saved = checkpoint.read(tmp_path / "checkpoints/last.pt")
    assert saved["step"] == one.step == 6
    assert same(saved["model"], one.flow.state_dict())
    assert signal.getsignal(signum) is before


def test_patience_ends_a_run_that_no_longer_gains(tmp_path):
    one = trainer(tmp_path, patience=3, val_every=1, max_steps=1000)
    one.validation.evaluate = lambda flow, result=iter([3.0, 2.0, *[2.5] * 99]): type(
        "Result", (), {"bits_per_dim": next(result), "bits_per_dim_stderr": 0.1}
    )()
    run(one, tmp_path)
    assert (one.step, one.validation.best) == (5, 2.0)


def test_a_validation_that_fails_loses_nothing(tmp_path):
    one = trainer(tmp_path, max_steps=25)
    good = one.validation.evaluate

    def evaluate(flow):
        if one.step == 10:
            raise FlowtrainError("the likelihood of 1 of 16 examples is not finite")
        return good(flow)

    one.validation.evaluate = evaluate
    run(one, tmp_path)
    assert one.step == 25 and math.isfinite(one.validation.best)


def test_checkpoints_follow_the_clock_of_the_first_process(tmp_path, monkeypatch):
    """Which all processes share: none saves alone. Here a step takes a minute."""
    one = trainer(tmp_path, save_every=None, save_minutes=10)
    monkeypatch.setattr(training, "agree", lambda *figures: agree(*figures[:3], 60.0 * (one.step + 1)))
    saved, save = [], one.save
    monkeypatch.setattr(one, "save", lambda: saved.append(one.step) or save())
    run(one, tmp_path)
    assert saved == [11, 22, 30]


def test_minutes_are_a_budget(tmp_path):
    one = trainer(tmp_path, max_steps=None, max_minutes=0.01)
    run(one, tmp_path)
    assert 0.6 <= one.seconds < 5
    assert (tmp_path / "checkpoints/last.pt").exists()


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_ema_is_the_average_it_says():
    live = torch.nn.Linear(2, 1)
    ema, expected = EMA(live, 0.9), live.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            live.weight.add_(0.1)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * live.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)


class Counted(torch.nn.Module):
    """A parameter, and buffers of three dtypes, one of them without elements and one that other code replaces."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("count", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("left_out", None)

    def forward(self, x):
        self.flags, self.count = ~self.flags, self.count + 1
        return self.norm(self.layer(x))


def test_ema_copies_all_buffers_a_dtype_at_a_time(monkeypatch):
    live = Counted().train()
    ema = EMA(live, 0.9)
    calls, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: calls.append(len(lists[0])) or copy(*lists))
    for step in range(3):
        live(torch.randn(5, 2) + 3)
        ema.update(step)
        mine = dict(ema.model.named_buffers())
        assert all(torch.equal(mine[name], buffer) for name, buffer in live.named_buffers())
        assert not any(
            buffer.data_ptr() == mine[name].data_ptr() for name, buffer in live.named_buffers() if buffer.numel()
        )
    assert sorted(calls[:4]) == [1, 1, 1, 3] and len(calls) == 12 and mine["norm.num_batches_tracked"] == 3
    empty = EMA(torch.nn.Linear(1, 1), 0.9)
    empty.update(0)  # without buffers


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_fastest_algorithms_of_cudnn_are_looked_for_unless_runs_must_be_the_same(monkeypatch, deterministic):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    determinism.choose(deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark == (not deterministic)


def test_schedules():
    at = [0.0, 0.5, 1.0]
    assert [Constant()(p, 0) for p in at] == [1, 1, 1]
    assert [Linear(floor=0.2)(p, 0) for p in at] == pytest.approx([1, 0.6, 0.2])
    assert [Cosine()(p, 0) for p in at] == pytest.approx([1, 0.5, 0])
    assert [Cosine(floor=0.1, flat=0.5)(p, 0) for p in (0, 0.5, 0.75, 1)] == pytest.approx([1, 1, 0.55, 0.1])
    assert Exponential(0.5, 10)(0, 20) == 0.25
    assert [Steps((0.5, 0.75), 0.1)(p, 0) for p in (0, 0.5, 0.8)] == pytest.approx([1, 0.1, 0.01])
    with pytest.raises(ValueError, match="floor=2"):
        Cosine(floor=2)
    with pytest.raises(ValueError, match="every=0"):
        Exponential(every=0)


def evaluation_batches(size, n=40):
    x = torch.randint(0, LEVELS, (n, *SHAPE), generator=generator(0))
    return [(index, x[index], None) for index in torch.arange(n).split(size)], n


def test_evaluation_is_reproducible_and_leaves_the_generator_alone():
    flow = small_flow()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = evaluate(flow, *evaluation_batches(8), draws=3)
    assert torch.equal(before, torch.get_rng_state())
    assert evaluate(flow, *evaluation_batches(8), draws=3) == first
    assert evaluate(flow, *evaluation_batches(8), draws=3, seed=1) != first
    assert flow.training


def test_evaluation_does_not_depend_on_its_batches():
    flow = small_flow()
    one = evaluate(flow, *evaluation_batches(40), draws=2)
    batches, n = evaluation_batches(7)
    other = evaluate(flow, batches[::-1], n, draws=2)
    for key in ("log_likelihood", "log_likelihood_stderr", "bits_per_dim_iw"):
        assert getattr(other, key) == pytest.approx(getattr(one, key), rel=1e-6)


def test_evaluation_against_its_definitions():
    flow = small_flow().eval()
    batches, n = evaluation_batches(40)
    result = evaluate(flow, batches, n, draws=4)
    values = []
    for draw in range(4):
        with global_batch.examples(torch.arange(n), 0, draw):
            values.append(flow(batches[0][1]).double())
    values = torch.stack(values)
    assert result.log_likelihood == pytest.approx(values.mean().item())
    assert result.bits_per_dim == pytest.approx(-values.mean().item() / (6 * math.log(2)))
    assert result.bits_per_dim_stderr == pytest.approx(values.mean(0).std().item() / math.sqrt(40) / (6 * math.log(2)))
    weighted = (values.logsumexp(0) - math.log(4)).mean().item()
    assert result.bits_per_dim_iw == pytest.approx(-weighted / (6 * math.log(2)))
    assert result.bits_per_dim_iw < result.bits_per_dim


def test_evaluation_names_examples_without_a_likelihood():
    flow = Flow((1,), b.ActNorm)
    x = torch.tensor([[0.0], [math.nan], [1.0]])
    with pytest.raises(FloatingPointError, match=r"1 of 3 examples.*\[1\]"):
        evaluate(flow, [(torch.arange(3), x, None)], 3)


def test_checkpoints_verify_themselves(tmp_path):
    path = tmp_path / "a.pt"
    state = {"config": {"model": {"steps": 3}}, "model": {"w": torch.randn(1000)}, "step": 7}
    checkpoint.save(state, path)
    checkpoint.check(path)
    assert same(checkpoint.read(path), state)
    assert checkpoint.read_config(path) == state["config"]
    assert torch.load(path, weights_only=True)["step"] == 7  # torch opens it as it is
    whole = path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    rng = generator(0)
    for _ in range(100):
        at = torch.randint(len(whole) * 8, (), generator=rng).item()
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(FlowtrainError, match=r"a\.pt"):
            checkpoint.read(path)
    for length in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FlowtrainError, match=r"a\.pt"):
            checkpoint.read_config(path)
    with pytest.raises(FlowtrainError, match="cannot be read"):
        checkpoint.read(tmp_path / "missing.pt")


@pytest.mark.parametrize("found", [1, 3])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, found):
    checkpoint.save({"step": 7, "format": found}, tmp_path / "a.pt")
    says = rf"a\.pt: its format is {found}; this version of flowtrain reads format {checkpoint.FORMAT}$"
    for read in (checkpoint.read, checkpoint.read_config):
        with pytest.raises(FlowtrainError, match=says):
            read(tmp_path / "a.pt")


@pytest.mark.parametrize("found", [None, "2", True, 2.0])
def test_a_checkpoint_without_a_format_is_none(tmp_path, found):
    checkpoint.save({"step": 7, "format": found}, tmp_path / "a.pt")
    with pytest.raises(FlowtrainError, match=r"a\.pt: not a flowtrain checkpoint \(it does not say its format\)"):
        checkpoint.read(tmp_path / "a.pt")


@pytest.mark.parametrize("part", ["model", "recovery", "validation.best", "loggers.records"])
def test_a_state_that_lacks_a_part_is_refused(tmp_path, part):
    state = trainer(tmp_path).state_dict()
    whole, _, key = part.rpartition(".")
    del (state[whole] if whole else state)[key]
    with pytest.raises(FlowtrainError, match=f"cannot resume: the checkpoint lacks '{key}'$"):
        trainer(tmp_path).load_state_dict(state)


def test_a_checkpoint_by_torch_save_alone_is_no_checkpoint(tmp_path):
    torch.save({"config": {}}, tmp_path / "x.pt")
    with pytest.raises(FlowtrainError, match="no flowtrain checkpoint"):
        checkpoint.read(tmp_path / "x.pt")


def test_last_becomes_previous(tmp_path):
    for step in range(3):
        checkpoint.save_last({"step": step}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert [checkpoint.read(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")] == [2, 1]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save({"step": 1}, tmp_path / "a.pt")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"a\.pt: cannot be written \(No space left on device\): [\d,]+ bytes needed"):
        checkpoint.save({"step": 2}, tmp_path / "a.pt")
    monkeypatch.undo()
    assert checkpoint.read(tmp_path / "a.pt")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_what_is_reported_is_what_is_minimized():
    def flow(_x, _context):
        return torch.tensor([-4.0, -8.0])

    flow.dimensions = 2
    assert BitsPerDim().loss(flow, (None, None)).tolist() == pytest.approx([2 / math.log(2), 4 / math.log(2)])
    nats = NatsPerRow()
    assert nats.loss(flow, (None, None)).tolist() == [2, 4]
    assert nats.figure(flow, nats.loss(flow, (None, None)).mean().item()) == -6
    result = evaluate(small_flow(), *evaluation_batches(40))
    score = nats.score(result)
    assert -score.loss == score.figure == result.log_likelihood
    assert f"± {2 * result.log_likelihood_stderr:.4f} nats (2 standard errors)" in score.text


def test_integers_have_bits_and_real_numbers_nats():
    assert isinstance(maximum_likelihood(256), BitsPerDim) and isinstance(maximum_likelihood(None), NatsPerRow)
    assert all(isinstance(one, Objective) for one in (BitsPerDim(), NatsPerRow()))


class Reconstruction(Objective):
    """An objective beside the likelihood, which uses the flow's inverse."""

    key, unit = "reconstruction", "squared error"

    def loss(self, flow, batch):
        z = torch.randn(len(batch[0]), *flow.bijection.out_shape)
        return flow.bijection.inverse(z)[0].square().flatten(1).mean(1)

    def figure(self, flow, loss):
        return loss

    def score(self, evaluation):
        return BitsPerDim().score(evaluation)


def test_another_objective_needs_no_other_loop(tmp_path):
    torch.manual_seed(0)
    flow = Flow(SHAPE, partial(b.Chain, layers={"scale": b.LULinear, "actnorm": b.ActNorm}))
    one = trainer(tmp_path, flow=flow, max_steps=60)
    one.objective = Reconstruction()
    one.training_pass.loss.objective = one.objective
    run(one, tmp_path)
    values = [row["train/reconstruction"] for row in lines(tmp_path) if "train/reconstruction" in row]
    assert values[-1] < values[0] / 2


class Recorder(NullLogger):
    def __init__(self):
        self.calls = []

    def open(self, run):
        self.calls.append(("open", run.step, run.records))

    def scalars(self, step, values):
        self.calls.append(("scalars", step))

    def close(self):
        self.calls.append("closed")


class Unopened(Recorder):
    def open(self, run):
        raise WriteError("no disk")


def test_loggers_record_close_and_count(tmp_path):
    first, last = Recorder(), Recorder()
    loggers, record = Loggers([first, last]), RunRecord(tmp_path, 7, 3, Budget(9, None), "nats", "nats")
    assert isinstance(first, Logger) and not isinstance(Budget(1, None), Logger)
    loggers.open(record)
    loggers.scalars(8, {})
    loggers.close()
    assert first.calls == last.calls == [("open", 7, 3), ("scalars", 8), "closed"] and loggers.records == 1
    first, last = Recorder(), Unopened()
    loggers = Loggers([first, last])
    with pytest.raises(WriteError):
        loggers.open(record)
    loggers.close()
    assert first.calls[-1] == "closed" and last.calls == []  # what never opened is not closed


def test_progress_is_told_with_rate_and_time_left(tmp_path, caplog):
    lines = ProgressLines()
    lines.open(RunRecord(tmp_path, 0, 0, Budget(100, None), "bits_per_dim", "bits/dim"))
    with caplog.at_level("INFO", logger="flowtrain"):
        values = {"train/bits_per_dim": 2.5, "system/seconds": 10.0, "system/rows_per_second": 320.0}
        lines.scalars(10, values)
        lines.scalars(10, {"val/bits_per_dim": 2.5})
    assert caplog.messages == ["step 10: 2.5000 bits/dim, 320 rows/s, 1:30 left"]


# ---- what a step costs ---------------------------------------------------------------------------------------------

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")  # item, bool and masks end in one of them


def within(event, name):
    return event is not None and (event.name == name or within(event.cpu_parent, name))


def reads(monkeypatch, one, x):
    """How often a step on ``x`` waits for the device: reads that the profiler sees, and lists, which it does not."""
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or tolist(tensor))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        one.update(agree(*one.gradient(x), 0, 0.0))
        one.step += 1
        one.report(1.0, elapsed=1.0)
    seen = [event for event in record.events() if event.name in READS]
    # a CPU's Adam reads its own count of steps; a GPU's does so on the device
    return len(lists) + sum(not within(event, "aten::_fused_adam_") for event in seen)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_reads_the_device_once(tmp_path, monkeypatch, accumulate, clip):
    flow = small_flow()
    one = trainer(tmp_path, flow=flow, accumulate=accumulate, clip=clip)
    one.weights.optimizer = torch.optim.Adam(flow.parameters(), 1e-2, fused=True)
    batches = one.loader.batches()
    assert [reads(monkeypatch, one, next(batches)) for _ in range(3)] == [1, 1, 1]
    one.objective.loss = lambda flow, batch: flow(*batch) * flow(*batch).mean().item()  # and one that is counted
    assert reads(monkeypatch, one, next(batches)) == 1 + accumulate


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_waits_once(tmp_path):
    flow = small_flow().cuda()
    one = trainer(tmp_path, flow=flow)
    one.weights.optimizer = torch.optim.Adam(flow.parameters(), 1e-2, fused=True)
    batches = (batch.to("cuda") for batch in one.loader.batches())
    for _ in range(2):
        one.update(agree(*one.gradient(next(batches)), 0, 0.0))
    x = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, norm = one.gradient(x)
        torch.cuda.set_sync_debug_mode("default")
        agreed = agree(loss, norm, 0, 0.0)  # copies this process's clock
        torch.cuda.set_sync_debug_mode("error")
        one.update(agreed)  # waits for an event alone
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- equations that cannot be solved -------------------------------------------------------------------------------


def ode_flow(**options):
    torch.manual_seed(0)
    net = partial(nets.ODENet, hidden=8, depth=1)
    layer = partial(b.Continuous, net=net, **{"rtol": 1e-3, "atol": 1e-3, **options})
    return Flow(SHAPE, partial(b.Chain, layers={"dequantize": partial(b.Dequantize, grey_levels=LEVELS), "ode": layer}))


@pytest.mark.parametrize("adjoint", [False, True])
def test_an_equation_without_a_solution_is_a_bad_step(tmp_path, adjoint, caplog):
    one = trainer(tmp_path, Batches(poison=[3, 7]), flow=ode_flow(adjoint=adjoint), max_steps=10)
    run(one, tmp_path)
    assert (one.step, one.recovery.skipped, one.recovery.in_a_row) == (10, 2, 0)
    assert all(value.isfinite().all() for value in one.flow.state_dict().values())
    assert "step 3: an ODE (" in caplog.text and "step 7: an ODE" not in caplog.text


def test_an_equation_whose_gradient_has_no_solution_is_a_bad_step(tmp_path, caplog):
    flow = ode_flow(adjoint=True)
    one, ode = trainer(tmp_path, flow=flow), flow.bijection.ode
    ode.register_forward_hook(lambda *_: setattr(ode, "max_steps", 1))  # of what comes after, the gradient's solve
    agreed = agree(*one.gradient(next(one.loader.batches())), 0, 0.0)
    one.update(agreed)
    loss, norm, *_ = agreed.read()
    assert math.isfinite(loss) and math.isnan(norm)
    assert one.recovery.skipped == 1 and "max_steps=1" in caplog.text


def test_samples_that_cannot_be_drawn_end_no_run(tmp_path, caplog):
    def draw(_flow):
        raise FloatingPointError("an ODE came to no end")

    one = trainer(tmp_path, sample_every=10)
    one.previews.draw = draw
    run(one, tmp_path)
    assert one.step == 30
    assert "step 10: no image: an ODE came to no end" in caplog.text


class Doubtful(Backpropagation):
    """Finds, when it is asked, that the gradients so far were wrong."""

    def statistics(self):
        raise FloatingPointError("inverses are off")


def test_wrong_gradients_end_a_run_before_its_weights_are_kept(tmp_path):
    flow = small_flow()
    flow.set_backpropagation(Doubtful())
    with pytest.raises(FloatingPointError, match="inverses are off"):
        run(trainer(tmp_path, flow=flow, save_every=5, log_every=1000), tmp_path)
    assert not (tmp_path / "checkpoints" / "last.pt").exists()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", UNSHIELDED)
def test_optimizers_that_import_no_compiler_do_what_torchs_do(kind, fused):
    found = []
    for made in (kind, UNSHIELDED[kind]):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias]}]
        optimizer = made(groups, lr=0.1, fused=fused)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(4):
            if step == 2:
                state = optimizer.state_dict()
                optimizer = made(groups, lr=0.5, fused=fused)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            assert layer.weight.grad is None
            layer(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            scheduler.step()
            assert torch.is_grad_enabled()
        found.append((layer.state_dict(), optimizer.state_dict()))
    assert made.__name__ == kind.__name__ and issubclass(made, kind)
    again = pickle.loads(pickle.dumps(optimizer))
    torch.testing.assert_close(again.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(*found, rtol=0, atol=0)
