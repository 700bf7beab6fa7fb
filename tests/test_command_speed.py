"""Evaluation and sampling in batches: results do not depend on them, nothing is computed twice, files are streamed."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from composed import checkpoint_command_config, configuration
from test_commands import SAMPLE

from flowtrain import bijections as b
from flowtrain import flows, load, train
from flowtrain.bijections import channels, linear
from flowtrain.commands import draws, examples, outputs, sample
from flowtrain.commands.outputs import open_array, open_table
from flowtrain.distributions import ConditionalNormal, Mixture, StandardNormal
from flowtrain.engine import memory_budget
from flowtrain.engine.evaluate import evaluation_mode, log_likelihoods
from flowtrain.engine.peak import peak_bytes
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.runtime import global_batch, kept
from flowtrain.runtime.files import WriteError
from flowtrain.runtime.noise import ExampleNoise

CPU = torch.device("cpu")
BASES = {"normal": (StandardNormal, None), "mixture": (Mixture, None), "class_normal": (ConditionalNormal, 3)}

# ---- the noise of an example ---------------------------------------------------------------------------------------


def test_noise_belongs_to_the_example():
    index = torch.tensor([5, 0, 2**40, 17])
    for dtype in (torch.float32, torch.float64):
        whole = ExampleNoise(index, 3, 1).uniform((4, 2, 3), dtype=dtype)
        assert whole.dtype == dtype and (whole >= 0).all() and (whole < 1).all()
        for place in range(4):
            assert torch.equal(ExampleNoise(index[[place]], 3, 1).uniform((1, 2, 3), dtype=dtype)[0], whole[place])
    noise = ExampleNoise(index, 3, 1)
    draws = [noise.uniform((4, 2, 3)), noise.uniform((4, 2, 3)), ExampleNoise(index, 3, 2).uniform((4, 2, 3))]
    draws.append(ExampleNoise(index + 1, 3, 1).uniform((4, 2, 3)))
    assert len(torch.cat(draws).unique()) == 4 * 24


def test_noise_is_uniform_and_independent():
    u = ExampleNoise(torch.arange(100_000), 0).uniform((100_000, 4), dtype=torch.float64)
    again = ExampleNoise(torch.arange(100_000), 1).uniform((100_000, 4), dtype=torch.float64)
    for moment in (1, 2, 3):
        error = (u**moment).mean(0) - 1 / (moment + 1)
        assert error.abs().max() < 5 * math.sqrt(1 / (2 * moment + 1) / len(u))
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 4000).square() / 4000).sum() < 160  # chi-squared of 99 degrees of freedom
    columns = torch.cat([u, again, u.roll(1, 0)], 1)  # other places, another seed, the example before
    correlation = torch.corrcoef(columns.T) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(len(u))


def test_layers_draw_the_noise_of_the_examples():
    layer = b.Dequantize((3,), grey_levels=4)
    x, index = torch.tensor([[0, 1, 2], [3, 2, 1], [0, 0, 0]]), torch.tensor([4, 8, 9])
    with global_batch.examples(index, 0):
        whole = layer(x)[0]
    with global_batch.examples(index[1:], 0):
        part = layer(x[1:])[0]
    assert torch.equal(part, whole[1:]) and len(whole.unique()) == 9


# ---- what follows from weights alone -------------------------------------------------------------------------------


def mixing(shape):
    return flows.custom(shape, layers={"norm": b.ActNorm, "dense": b.DenseLinear, "lu": b.LULinear}).eval()


@pytest.mark.parametrize("shape", [(5,), (4, 3, 3)])
def test_factorizations_are_kept_and_never_stale(shape, monkeypatch):
    torch.manual_seed(0)
    flow, x = mixing(shape).double(), torch.randn(6, *shape, dtype=torch.float64)
    calls = []
    for module, name in ((channels, "inverse_matrix"), (linear, "inverse_matrix")):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda matrix, made=made: calls.append(1) or made(matrix))

    def both():
        return flow.log_prob(x), flow.decode(x)

    with torch.no_grad():
        before = both()
        once = len(calls)
        assert once
        with kept.keep():
            for _ in range(3):
                for found, wanted in zip(both(), before):
                    assert torch.equal(found, wanted)
            assert len(calls) == 2 * once
            for parameter in flow.parameters():
                parameter.add_(0.1)
            changed = both()
            assert all(not torch.allclose(*pair) for pair in zip(changed, before))
            flow.load_state_dict(mixing(shape).double().state_dict())
            loaded = both()
        for found, wanted, old in zip(loaded, both(), changed):
            assert torch.equal(found, wanted) and not torch.allclose(found, old)


def test_nothing_is_kept_where_gradients_are_needed():
    flow, x = mixing((4, 2, 2)), torch.randn(3, 4, 2, 2)
    with kept.keep():
        for _ in range(2):
            flow.zero_grad()
            flow(x).sum().backward()
            assert all(parameter.grad is not None for parameter in flow.parameters())


# ---- batches -------------------------------------------------------------------------------------------------------


def test_batches_follow_the_budget(monkeypatch):
    flow = flows.maf((3,), hidden=8).eval()
    x = torch.randn(256, 3)

    def work():
        log_likelihoods(flow, torch.arange(256), x)

    with evaluation_mode(CPU):
        monkeypatch.setattr(memory_budget, "budget", lambda device: 2**20)
        rows = memory_budget.rows_within_budget(work, 256, CPU)
        monkeypatch.setattr(memory_budget, "budget", lambda device: 2**21)
        twice = memory_budget.rows_within_budget(work, 256, CPU)
        monkeypatch.setattr(memory_budget, "budget", lambda device: 1)
        assert memory_budget.rows_within_budget(work, 256, CPU) == 1
    assert 256 < rows < twice <= 2 * rows + 1
    assert [memory_budget.few_rows(d) for d in (2, 3072, 10**6)] == [256, 21, 1]


def test_a_gpu_has_an_eighth_of_its_memory_for_a_batch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    assert memory_budget.budget(torch.device("cuda", 1)) == 10 * 2**30
    assert memory_budget.budget(CPU) == 2**24 * max(2, torch.get_num_threads())
    monkeypatch.setattr(memory_budget, "peak_bytes", lambda work: 100 * 2**20)  # of 8 examples of a large flow
    assert memory_budget.rows_within_budget(None, 8, torch.device("cuda")) == 819


def test_latents_and_data_of_examples_do_not_depend_on_the_batch(monkeypatch):
    torch.manual_seed(0)
    flow = flows.maf((3,), hidden=64).eval()
    x, restored, sizes = torch.randn(3000, 3), SimpleNamespace(flow=flow), []
    flow.bijection.register_forward_hook(lambda _layer, inputs, _output: sizes.append(len(inputs[0])))
    z = examples.encode(restored, x, None)
    assert sizes == [256, 2744]  # what is measured, and the rest
    torch.testing.assert_close(examples.decode(restored, z, None), x)
    torch.testing.assert_close(examples.encode(restored, x[:500], None), z[:500])  # a CPU may round otherwise
    monkeypatch.setattr(memory_budget, "budget", lambda device: 2**20)
    sizes.clear()
    torch.testing.assert_close(examples.encode(restored, x, None), z)
    assert sizes[0] == 256 < min(sizes[1:-1]) and len({*sizes[1:-1]}) == 1 and sum(sizes) == 3000

    def peak(budget):
        monkeypatch.setattr(memory_budget, "budget", lambda device: budget)
        return peak_bytes(lambda: examples.encode(restored, x, None))

    assert peak(2**20) < 2**20 < 1.25 * 2**20 < peak(2**24)


@pytest.mark.parametrize("name", BASES)
def test_samples_depend_on_neither_batches_nor_processes(name, monkeypatch):
    torch.manual_seed(0)
    base, classes = BASES[name]
    flow = flows.made((2,), hidden=8, base=base, context_shape=classes and (classes,))
    context = classes and torch.eye(3)[torch.arange(1500) % 3]
    whole = draws.draw_samples(flow, 1500, 1, context)
    assert whole.shape == (1500, 2) and len(whole.unique()) == 3000
    monkeypatch.setattr(memory_budget, "budget", lambda device: 1000)
    torch.testing.assert_close(draws.draw_samples(flow, 1500, 1, context), whole)
    monkeypatch.setattr(draws.distributed, "broadcast_object", lambda value: value)
    of = None if context is None else context.__getitem__
    for world in (2, 3):  # of six batches
        shares = [list(draws.sample_batches(flow, 1500, 1, of, 1.0, rank, world)) for rank in range(world)]
        turns = sorted((first, samples) for share in shares for first, samples in share)
        assert [len(share) for share in shares] == [6 // world] * world
        torch.testing.assert_close(torch.cat([samples for _, samples in turns]), whole)
    assert not torch.equal(draws.draw_samples(flow, 1500, 2, context), whole)


# ---- files ---------------------------------------------------------------------------------------------------------

PARTS = [
    {"n": np.array([1, 2]), "x": np.array([0.1, np.nan]), "text": np.array(["plain", None], dtype=object)},
    {"n": np.array([3]), "x": np.array([1e-7]), "text": np.array(['a "b", c'], dtype=object)},
    {"n": np.array([4]), "x": np.array([2.0]), "text": np.array(["é"], dtype=object)},
]


@pytest.mark.parametrize("arrow", [True, False])
def test_a_csv_file_is_written_with_or_without_pyarrow(tmp_path, monkeypatch, arrow):
    if not arrow:
        monkeypatch.setattr(outputs, "find_spec", lambda name: None)
    with open_table(tmp_path / "a, b.csv") as write:
        for part in PARTS:
            write({f"{name}, {name}": values for name, values in part.items()})
            assert not (tmp_path / "a, b.csv").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["a, b.csv"]
    rows = list(csv.reader((tmp_path / "a, b.csv").open(newline="")))
    assert rows[0] == ["n, n", "x, x", "text, text"] and [row[2] for row in rows[1:]] == ["plain", "", 'a "b", c', "é"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3", "4"]
    assert [row[1] and float(row[1]) for row in rows[1:]] == [0.1, "", 1e-7, 2.0]


def test_a_parquet_file_has_one_schema(tmp_path):
    with open_table(tmp_path / "rows.parquet") as write:
        for part in PARTS:
            write(part)
    found = pd.read_parquet(tmp_path / "rows.parquet")
    assert found["n"].tolist() == [1, 2, 3, 4] and found["text"].dropna().tolist() == ["plain", 'a "b", c', "é"]
    assert found["x"].isna().tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_file_that_is_not_whole_does_not_appear(tmp_path, name):
    with pytest.raises(KeyError), open_table(tmp_path / name) as write:
        write(PARTS[0])
        raise KeyError
    with pytest.raises(OSError, match="of another file"), open_table(tmp_path / name) as write:
        write(PARTS[0])
        raise OSError("of another file")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(WriteError, match="cannot be written"), open_table(tmp_path / "none" / name) as write:
        write(PARTS[0])


def test_an_array_is_written_in_parts(tmp_path):
    x = np.random.default_rng(0).normal(size=(10, 2, 3)).astype(np.float32)
    with open_array(tmp_path / "x.npy", 10) as write:
        for part in (x[:1], x[1:7], x[7:]):
            write(part)
    assert np.array_equal(np.load(tmp_path / "x.npy"), x)


# ---- sample --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A run on a table of two columns, conditional on two others."""
    folder, random = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    age, sex = random.integers(18, 90, 400), random.choice(["f", "m"], 400)
    height = random.normal(1.6, 0.1, 400) + 0.1 * (sex == "m")
    frame = pd.DataFrame({"age": age, "sex": sex, "height": height, "shoes": random.integers(35, 47, 400)})
    frame.to_csv(folder / "people.csv", index=False)
    words = [
        f"dataset.path={folder}/people.csv",
        "dataset.context=[age,sex]",
        "smoke=true",
        "logger=none",
    ]
    config = configuration("dataset=table", "model=maf", *words)
    (folder / "run").mkdir()
    return folder, config, train.main(config, str(folder / "run"))


def run_sample(people, out, **keys):
    folder, config, summary = people
    out.mkdir()
    keys = {**SAMPLE, "plot": False, **keys}
    return sample.main(checkpoint_command_config("sample", config, ckpt=summary["checkpoint"], **keys), str(out))


def test_contexts_come_from_a_file(people, tmp_path, monkeypatch):
    given = pd.DataFrame({"note": ["x", "y", "z"], "sex": ["m", "f", "m"], "age": [30, 40, 50]})
    given.to_csv(tmp_path / "given.csv", index=False)
    given.to_parquet(tmp_path / "given.parquet")
    drawn = []
    for name, budget in (("csv", 2**25), ("parquet", 1000)):
        monkeypatch.setattr(memory_budget, "budget", lambda device, budget=budget: budget)
        paths = run_sample(people, tmp_path / name, n=200, context=str(tmp_path / f"given.{name}"))
        drawn.append(pd.read_csv(paths["csv"]))
    pd.testing.assert_frame_equal(drawn[0], drawn[1], rtol=1e-4)
    assert list(drawn[0]) == ["age", "sex", "height", "shoes", "row"] and len(drawn[0]) == 600
    assert drawn[0]["row"].tolist() == [1] * 200 + [2] * 200 + [3] * 200
    assert drawn[0]["age"].tolist() == [30] * 200 + [40] * 200 + [50] * 200 and drawn[0]["sex"][200] == "f"

    columns, flow = sample.restore(*restored(people)).columns, load(str(people[0] / "run"))
    x = torch.from_numpy(np.load(tmp_path / "csv/samples.npy"))
    z = flow.encode(x, columns.encode_context(drawn[0]))
    monkeypatch.undo()
    same = run_sample(people, tmp_path / "one", n=200, context={"age": 30, "sex": "m"})
    assert list(pd.read_csv(same["csv"])) == ["height", "shoes"]
    torch.testing.assert_close(torch.from_numpy(np.load(same["npy"])), x[:200], rtol=1e-4, atol=1e-4)
    assert abs(z[:, 0].mean()) < 0.2 and abs(z[:, 0].std() - 1) < 0.15  # each sample has the context of its row


def restored(people):
    _, config, summary = people
    config = checkpoint_command_config("sample", config, ckpt=summary["checkpoint"], **SAMPLE)
    return config, config.ckpt, config.weights


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ("age\n30\n", "has no column 'sex'; there are age"),
        ("age,sexe\n30,f\n", "has no column 'sex'; did you mean 'sexe'"),
        ("age,sex\n30,d\n", "column 'sex', row 1: 'd' is not one of f, m"),
        ("age,sex\n30,f\n,m\n", "column 'age', row 2 .*missing"),
        ("age,sex\n", "has no rows"),
        (None, "context=.*: no such file or folder"),
        (3, "give context='{age: …, sex: …}' or context=FILE"),
        ({"age": 30}, "give context='{age: …, sex: …}' or context=FILE"),
    ],
)
def test_contexts_that_do_not_fit(people, tmp_path, context, says):
    if isinstance(context, str):
        (tmp_path / "given.csv").write_text(context)
    context = str(tmp_path / "given.csv") if context is None or isinstance(context, str) else context
    with pytest.raises(UsageError, match=says):
        run_sample(people, tmp_path / "out", context=context)
    assert not [*(tmp_path / "out").iterdir()]


def test_samples_are_streamed_and_alike_in_all_files(people, tmp_path, monkeypatch):
    """Also at several temperatures; the pair plot shows a part of them."""
    monkeypatch.setattr(memory_budget, "budget", lambda device: 1000)
    monkeypatch.setattr(sample, "ROWS", 100)
    plotted = []
    monkeypatch.setattr(sample, "plot_pairs", lambda path, samples, *_: plotted.append(samples))
    keys = {"n": 1000, "context": {"age": 30, "sex": "m"}, "temperature": [0.5, 1.0]}
    paths = run_sample(people, tmp_path / "out", output=str(tmp_path / "rows.parquet"), plot=True, **keys)
    assert paths["csv"] == str(tmp_path / "rows.parquet")
    rows, x = pd.read_parquet(tmp_path / "rows.parquet"), np.load(paths["npy"])
    columns = sample.restore(*restored(people)).columns
    assert x.shape == (2000, 2) and list(rows) == ["height", "shoes"]
    for name, values in columns.decode(torch.from_numpy(x)).items():
        assert np.array_equal(rows[name], values)
    assert np.array_equal(plotted[0], rows.to_numpy(dtype=object)[::20])
    again = run_sample(people, tmp_path / "again", **keys)
    pd.testing.assert_frame_equal(pd.read_csv(again["csv"]), rows)


def test_samples_that_are_not_finite_leave_no_file(people, tmp_path):
    with pytest.raises(FlowtrainError, match="not finite; a lower temperature may help"):
        run_sample(people, tmp_path / "out", n=10, temperature=1e39, context={"age": 30, "sex": "m"})
    assert not [*(tmp_path / "out").iterdir()]
    for output, says in (("rows.txt", "must end in .csv or .parquet"), ("none/rows.csv", "there is no folder none")):
        with pytest.raises(UsageError, match=says):
            run_sample(people, tmp_path / output.replace("/", "_"), context={"age": 30, "sex": "m"}, output=output)


@pytest.mark.slow
def test_processes_share_the_samples(people, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    found = []
    for devices in (1, 2):
        words = ["sample", f"ckpt={people[0]}/run", "n=1000", "context={age: 30, sex: m}", f"devices={devices}"]
        command = [sys.executable, "-m", "flowtrain", *words, "plot=false", f"hydra.run.dir={tmp_path}/{devices}"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(np.load(tmp_path / f"{devices}/samples.npy"))
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("words", [["model=realnvp", "dataset=digits"], ["model=nsf_coupling", "dataset=moons"]])
def test_a_run_that_compiles_nothing_does_not_import_the_compiler(tmp_path, words):
    """It takes as long to import as torch."""
    command = ["train", *words, "smoke=true", "report=false"]
    code = f"import sys; from flowtrain.cli.main import run; assert run({command}) == 0; "
    code += "sys.exit(' '.join({'torch._dynamo', 'torch._inductor', 'sympy'} & {*sys.modules}) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
