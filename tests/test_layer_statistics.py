"""Statistics of each layer while training: what they say, and that they change nothing."""

import json
import math

import pytest
import torch
from composed import configuration
from inprocess import flowtrain

from flowtrain import bijections as b
from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.data.batch import Batch
from flowtrain.engine.objectives import NatsPerRow
from flowtrain.engine.statistics import LayerStatistics
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.flow import Flow

TINY = ("train", "smoke=true", "logger=none", "trainer.layer_statistics=true", "trainer.sample_every=null")


def measured(flow, x, context=None, parts=1, autocast=None, seed=3) -> dict:
    statistics = LayerStatistics(flow)
    with statistics.watch():
        TrainingPass(flow, NatsPerRow(), seed, parts, autocast).repeat(Batch(x, context), 0, 0, 1)
    return statistics.read()


def test_a_layer_of_known_scale_shows_it():
    class Scale(b.Bijection):
        def forward(self, x, context=None):
            return 5 * x, torch.full((len(x),), math.log(5) * 2)

    flow = Flow((2,), lambda **kwargs: b.Chain(layers={"first": Scale, "second": Scale}, **kwargs))
    found = measured(flow, torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    assert found == pytest.approx(
        {
            "layers/first/log_det": math.log(5),
            "layers/second/log_det": math.log(5),
            "layers/first/scale": 5 * 2.5,
            "layers/second/scale": 25 * 2.5,
        }
    )


@pytest.mark.parametrize(
    "words",
    [
        ("model=glow", "dataset=digits"),
        ("model=realnvp", "dataset=digits", "norm=batchnorm"),
        ("model=iaf", "dataset=moons"),
        ("model=ffjord", "dataset=moons"),
        ("model=residual", "dataset=moons"),
        ("model=nsf_coupling", "dataset=moons"),
        ("model=hybrid_image", "dataset=digits"),
    ],
    ids=lambda words: words[0],
)
def test_the_log_determinants_sum_to_that_of_the_flow(words):
    config = configuration(*words, "smoke=true")
    data = build_dataset(config)
    flow = build_flow(config, data.spec, "cpu")
    x, _ = data.split("train").take(torch.arange(12))
    flow.initialize(x.float())
    memory = "reversible" if words[0] == "model=glow" else "checkpoint"
    flow.set_backpropagation(MEMORY_MODES[memory]())
    buffers = {name: value.clone() for name, value in flow.named_buffers()}
    latents = []
    handle = flow.bijection.register_forward_hook(lambda _layer, _inputs, outputs: latents.append(outputs))
    found = measured(flow, x, parts=2)
    handle.remove()
    total = torch.cat([log_det for _, log_det in latents]).mean() / flow.dimensions
    assert sum(value for name, value in found.items() if name.endswith("log_det")) == pytest.approx(
        float(total), rel=1e-4
    )
    assert len(found) == 2 * len({name.rsplit("/", 1)[0] for name in found}) > 4
    assert all(torch.equal(value, buffers[name]) for name, value in flow.named_buffers())


def test_missing_values_do_not_count_and_divergence_shows():
    class Fill(b.Bijection):
        def forward(self, x, context=None):
            return x, torch.zeros(len(x))

    flow = Flow((2,), lambda **kwargs: b.Chain(layers={"a": Fill}, **kwargs))
    gaps = torch.tensor([[3.0, math.nan], [-3.0, 3.0]])
    assert math.isnan(measured(flow, gaps)["layers/a/scale"])
    statistics = LayerStatistics(flow)
    statistics.has_gaps = True
    with statistics.watch():
        flow(gaps)
    assert statistics.read()["layers/a/scale"] == pytest.approx(3.0)


def lines(run) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("system/")} for row in rows]


def test_a_run_records_them_and_trains_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # others are slow, and no less right
    for name, word in (("with", "true"), ("without", "false")):
        words = (*TINY, f"trainer.layer_statistics={word}", "max_steps=2", "precision=bfloat16")
        assert flowtrain(tmp_path, *words, f"hydra.run.dir={name}") == 0
    with_them, without = lines(tmp_path / "with"), lines(tmp_path / "without")
    layers = [{key: row.pop(key) for key in [*row] if key.startswith("layers/")} for row in with_them]
    assert with_them == without and [row["step"] for row in without] == [1, 2, 2]
    assert layers[0].keys() == layers[1].keys() and len(layers[0]) > 10 and not layers[2]
    assert all(map(math.isfinite, layers[1].values()))


def test_processes_share_them(tmp_path):
    words = (*TINY, "model=nice", "max_steps=2", "batch_size=8", "threads=1")
    assert flowtrain(tmp_path, *words, "hydra.run.dir=one") == 0
    assert flowtrain(tmp_path, *words, "devices=2", "hydra.run.dir=two") == 0
    (one, *_), (two, *_) = lines(tmp_path / "one"), lines(tmp_path / "two")
    keys = [key for key in one if key.startswith("layers/")]
    assert keys and {key: two[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-4)
