"""Promise 7: no step uses numbers that are not finite; their cause is named, and a replay shows it again."""

import json
import math
import random
from dataclasses import dataclass

import pytest
import torch
from composed import checkpoint_command_config, configuration
from inprocess import flowtrain
from ranks import run_on_two_ranks
from test_engine import BATCH, same, small_flow
from test_parallel import Slices, trainer

from flowtrain import train
from flowtrain.cli import exit_codes
from flowtrain.commands import check
from flowtrain.config.build import build
from flowtrain.config.conversion import validate
from flowtrain.config.schema import TrainConfig
from flowtrain.engine.objectives import BitsPerDim
from flowtrain.engine.replay import Record
from flowtrain.errors import FlowtrainError
from flowtrain.runtime import checkpoint, distributed

TINY = (
    "dataset=moons",
    "dataset.rows=2000",
    "batch_size=32",
    "max_steps=20",
    "model.hidden=8",
    "trainer.warmup_steps=0",
    "logger=none",
    "trainer.val_every=100",
    "trainer.sample_every=null",
    "trainer.max_bad_steps=3",
    "allow=[traps]",
)
FIRST, AMID = "[preprocess,trap,flatten,pairs]", "[preprocess,flatten,trap,pairs]"
LAST = "[preprocess,flatten,pairs,trap]"
ACTNORM = "norm=actnorm"


def trap_words(way, value, order=AMID, after=5, model="realnvp_vector"):
    target = f"{{_target_: traps.Trap, _partial_: true, way: {way}, value: {value}, after: {after}}}"
    return f"model._target_=traps.{model}", f"+model.trap={target}", f"+model.places={order}"


def data_words(value, spoiled="null"):
    return "dataset._target_=traps.Spoiled", f"+dataset.value={value}", f"+dataset.spoiled={spoiled}"


@dataclass(frozen=True)
class Fault:
    """A fault of a run, and what its record must name: the layer, and a word of what is not finite there."""

    words: tuple[str, ...]
    layer: str
    what: str
    more: tuple[str, ...] = ()
    model: str = "realnvp_vector"
    rows: str = "beyond"  # the rows that the record names: those beyond the edge, "some", or "none"


FAULTS = [
    Fault(data_words("nan"), "data", "data"),
    Fault(data_words("inf"), "data", "data", ("trainer.accumulate=2",)),
    Fault(data_words("-inf"), "data", "data", ("memory=checkpoint", "trainer.ema=null")),
    Fault(data_words("1e30"), "scaling", "norm", model="nice", rows="none"),
    Fault(trap_words("output", "nan"), "trap", "output"),
    Fault(trap_words("output", "-inf"), "trap", "output", ("trainer.accumulate=4",)),
    Fault(trap_words("output", "inf", FIRST), "trap", "output", ("memory=reversible", ACTNORM)),
    Fault(trap_words("output", "1e30", LAST), "base", "log-likelihood", rows="some"),
    Fault(trap_words("output", "inf", "[preprocess,flatten,trap,steps]", model="maf"), "trap", "output", model="maf"),
    Fault(trap_words("log_determinant", "nan"), "trap", "log-determinant", ("memory=checkpoint",)),
    Fault(trap_words("log_determinant", "inf", FIRST), "trap", "log-determinant", ("optimizer=sgd",)),
    Fault(trap_words("gradient", "nan"), "trap", "gradient"),
    Fault(trap_words("gradient", "inf", FIRST), "trap", "gradient", ("trainer.accumulate=2",)),
    Fault(trap_words("gradient", "nan"), "trap", "gradient", ("memory=reversible", ACTNORM)),
    Fault(trap_words("gradient", "-inf"), "trap", "gradient", ("trainer.clip=null", "optimizer=adamax")),
    Fault(trap_words("gradient", "1e36"), "trap", "norm", rows="none"),
    Fault(trap_words("gradient_of_a_weight", "nan"), "trap", "scale", rows="none"),
    Fault(trap_words("gradient_of_a_weight", "-inf", LAST), "trap", "scale", ("memory=checkpoint",), rows="none"),
    Fault(trap_words("weight", "nan"), "trap", "whose trap.scale is not finite", rows="some"),
    Fault(
        trap_words("weight", "inf", LAST), "trap", "whose trap.scale is not finite", ("trainer.ema=null",), rows="some"
    ),
]


def replay_config(config, file):
    keys = {"examples": 8, "jacobian": 4096, "tolerance": 1.0, "weights": "auto", "json": False}
    keys |= {"calibration": False, "simulations": 1000, "draws": 1000, "reference": None}
    return checkpoint_command_config("check", config, ckpt=None, replay=str(file), **keys)


def find_failure(fault: Fault, folder) -> str | None:
    """Train with a fault, and return what is not as promised, or None."""
    folder.mkdir()
    cfg = configuration(f"model={fault.model}", *TINY, *fault.words, *fault.more)
    try:
        train.main(cfg, str(folder))
    except FlowtrainError as error:
        code, line = error.exit_code, str(error)
    else:
        return "no error"
    if code != 1 or "3 steps in a row" not in line or "\n" in line:
        return f"{code}: {line}"
    (file,) = folder.glob("divergence/*.pt")
    record = checkpoint.read(file)["divergence"]
    found, x = record["found"], record["x"]
    if f"step {record['step']}:" not in line or str(file) not in line or found["what"] not in line:
        return line
    if found["layer"] != fault.layer or fault.what not in found["what"]:
        return f"{found['what']} of {found['layer']} is blamed"
    beyond = (~(x.abs() <= 1e29).all(1) | (x[:, 0] > 0.5)).nonzero().flatten().tolist()
    rows = {"beyond": beyond, "none": [], "some": found["rows"][:]}[fault.rows]
    if found["rows"] != rows or (not rows) != (fault.rows == "none"):
        return f"rows {found['rows']} are blamed, not {rows}"
    split = build(cfg.dataset, "dataset", allow=cfg.allow).split("train")
    if not torch.equal(split.data[record["examples"]].nan_to_num(), x.nan_to_num()):
        return "its examples are not those of the batch"
    kept = checkpoint.read(folder / "checkpoints/last.pt")
    if "weight" not in " ".join(fault.words) and not all(value.isfinite().all() for value in kept["model"].values()):
        return "a weight is not finite"
    return _find_replay_failure(cfg, file, record)


def _find_replay_failure(cfg, file, record) -> str | None:
    """Replay a record, and return what differs from it, or None."""
    again = file.parent.parent / "again"
    again.mkdir()
    try:
        check.main(replay_config(cfg, file), str(again))
    except FlowtrainError as error:
        report = json.loads((again / "check.json").read_text())
        found = record["found"]
        examples = [record["examples"][row] for row in found["rows"]]
        if (report["layer"], report["what"], report["examples"]) == (found["layer"], found["what"], examples):
            return None if report["as_recorded"] and found["what"] in str(error) else str(error)
        return str(report)
    return "its replay is finite"


def test_every_fault_is_named_and_replayed(tmp_path, count, promise):
    chosen = random.Random(1).sample(range(len(FAULTS)), count(len(FAULTS)))
    wrong = {}
    for number in chosen:
        if what := find_failure(FAULTS[number], tmp_path / str(number)):
            wrong[FAULTS[number]] = what
    promise(
        7,
        "20 faults survived, told by step, layer and examples, and shown again by a replay",
        f"{len(chosen) - len(wrong)} of {len(chosen)}",
    )
    assert not wrong, "\n".join(f"{fault}: {what}" for fault, what in wrong.items())


# ---- on the command line -------------------------------------------------------------------------------------------


def run(cwd, *words):
    """Run a command and return its exit code and the message of its error."""
    try:
        return flowtrain(cwd, *words), ""
    except FlowtrainError as error:
        text, code = exit_codes.describe_error(error)
        return code, text


def test_the_message_has_a_command_that_replays_the_step(tmp_path, capsys):
    code, line = run(tmp_path, "train", "model=realnvp_vector", *TINY, *trap_words("output", "nan"))
    assert code == 1 and "first the output of layer trap, of train examples" in line
    words = line.partition("flowtrain check ")[2].partition(";")[0].replace("'", "").split()
    capsys.readouterr()
    code, again = run(tmp_path, "check", *words, "json=true")
    assert code == 1 and again.startswith("step 7 goes wrong again: first the output of layer trap")
    report = json.loads(capsys.readouterr().out)
    assert report["as_recorded"] and report["layer"] == "trap"
    path, allow = words
    assert run(tmp_path, "check", path)[1].endswith("(your own classes: allow=[module])")
    assert run(tmp_path, "check", "replay=none.pt")[0] == 2
    last = next(tmp_path.glob("outputs/*/*/checkpoints/last.pt"))
    code, line = run(tmp_path, "check", f"replay={last}", allow)
    assert code == 1 and "no record of a step that went wrong" in line


CHANGES = (
    {"x": "text"},
    {"x": torch.zeros(32, 5)},
    {"x": torch.zeros(32, 2, dtype=torch.complex64)},
    {"x": torch.zeros(31, 2)},
    {"world": 10**12},
    {"world": 0},
    {"world": 3},
    {"parts": 0},
    {"seed": None},
    {"step": "1"},
    {"examples": []},
    {"examples": [1.5] * 32},
    {"context": torch.zeros(31, 3)},
    {"context": 1},
    {"found": {"layer": 3}},
    {"found": [1]},
    {"more": 1},
)


def test_an_invalid_record_is_refused(tmp_path):
    with pytest.raises(FlowtrainError):
        train.main(configuration("model=realnvp_vector", *TINY, *trap_words("output", "nan")), str(tmp_path))
    (file,) = tmp_path.glob("divergence/*.pt")
    state = checkpoint.read(file)
    config = replay_config(validate(TrainConfig, state["config"]), file)
    for number, change in enumerate(CHANGES):
        checkpoint.save({**state, "divergence": {**state["divergence"], **change}}, file)
        (tmp_path / str(number)).mkdir()
        with pytest.raises(FlowtrainError, match=r"step_7\.pt: no record of a step that went wrong \(") as caught:
            check.main(config, str(tmp_path / str(number)))
        assert "\n" not in str(caught.value), change


# ---- skipped steps and rollbacks -----------------------------------------------------------------------------------


def test_only_batches_with_bad_examples_are_skipped(tmp_path):
    cfg = configuration("model=realnvp_vector", *TINY, *data_words("nan", "[3,700]"), "max_steps=50")  # one epoch
    summary = train.main(cfg, str(tmp_path))
    assert 1 <= summary["skipped_steps"] <= 2 and math.isfinite(summary["log_likelihood"])


WILD = (
    "model=realnvp_vector",
    *TINY,
    "optimizer=sgd",
    "optimizer.lr=1e8",
    "trainer.clip=null",
    "trainer.rollback=1e-3",
    "scheduler=constant",
    "trainer.save_every=12",
    "max_steps=40",
)


def test_a_run_that_diverges_rolls_back_and_lowers_its_rate(tmp_path, promise, caplog):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    summary = train.main(configuration(*WILD), str(whole))
    train.main(configuration(*WILD, "max_steps=12"), str(parts))
    middle = parts / "checkpoints/previous.pt"  # of step 12, before the end of the run
    assert 0 < checkpoint.read(middle)["recovery"]["rollbacks"] < summary["rollbacks"]
    train.main(configuration(*WILD, f"resume={middle}"), str(parts))
    states = [checkpoint.read(each / "checkpoints/last.pt") for each in (whole, parts)]
    for state in states:
        state["config"] = None
    equal = same(*states)
    promise(
        7,
        "rolled back to the last good state with a lower rate, bit-identical when resumed",
        f"{summary['rollbacks']} of {summary['rollbacks']}" if equal else "not identical",
    )
    assert equal and math.isfinite(summary["log_likelihood"]) and summary["steps"] == 40
    assert "the rate times 1e-06 (rollback 2 of at most 3)" in caplog.text
    rates = [json.loads(row)["train/lr"] for row in (whole / "metrics.jsonl").read_text().splitlines() if "lr" in row]
    assert rates[-1] == 1e8 * 1e-3 ** summary["rollbacks"]


def test_a_run_stops_after_three_rollbacks(tmp_path):
    trap = trap_words("output", "nan", after=1)
    with pytest.raises(FlowtrainError, match="stopped at step 12: 3 steps in a row"):  # the fourth time
        train.main(configuration("model=realnvp_vector", *TINY, *trap, "trainer.rollback=0.5"), str(tmp_path))


# ---- two processes -------------------------------------------------------------------------------------------------


class Halves(Slices):
    def examples(self, step):
        first = step * BATCH + distributed.rank() * BATCH // 2
        return [*range(first, first + BATCH // 2)]


def diverge_on_one_rank(folder):
    """Train with bad data on one rank, then with a bad weight on one rank.

    Returns the message of the first run, and the rollbacks, the skipped steps and the weights of the second.
    """
    one = trainer(folder / "data", small_flow(), max_bad_steps=3, max_steps=20)
    one.loader = Halves(poison=range(4, 99))
    lines = []
    try:
        one.fit()
    except FlowtrainError as error:
        lines.append(str(error))
    one = trainer(folder / "weight", small_flow(), max_bad_steps=3, max_steps=12, rollback=0.5)
    one.loader = Halves()
    update = one.update

    def update_and_spoil(agreed):
        result = update(agreed)
        if one.step == 5 and distributed.rank() == 1:
            with torch.no_grad():
                one.flow.bijection.mixing.lu[1] = math.nan
        return result

    one.update = update_and_spoil
    one.validation.evaluate = lambda _flow: (_ for _ in ()).throw(FlowtrainError("not here"))
    one.fit()
    return (
        lines,
        one.recovery.rollbacks,
        one.recovery.skipped,
        [parameter.detach() for parameter in one.flow.parameters()],
    )


def test_two_processes_agree_on_the_fault_of_one(tmp_path, promise):
    (lines, rollbacks, skipped, weights), (others, *counts, other_weights) = run_on_two_ranks(
        diverge_on_one_rank, tmp_path
    )
    agreed = lines == others and (rollbacks, skipped) == tuple(counts) and all(map(torch.equal, weights, other_weights))
    promise(7, "data, and a weight, spoiled in one process of two: both agree", f"{2 * agreed} of 2")
    assert agreed and (rollbacks, skipped) == (1, 3)
    assert all(weight.isfinite().all() for weight in weights)
    state = checkpoint.read(tmp_path / "data/divergence/step_6.pt")
    record = Record.from_state_dict(state["divergence"])
    assert record.found.layer == "data" and record.found.rows == tuple(range(BATCH // 2, BATCH))
    assert f"train examples {6 * BATCH + BATCH // 2}, " in lines[0]
    flow = small_flow()
    flow.load_state_dict(state["model"])
    assert record.replay(flow, BitsPerDim(), None) == record.found
    state = checkpoint.read(tmp_path / "weight/divergence/step_8.pt")  # of the process with the bad weight
    assert not state["model"]["bijection.mixing.lu"].isfinite().all()
    found = Record.from_state_dict(state["divergence"]).found
    assert found.layer == "mixing" and "whose mixing.lu is not finite" in found.what
