"""Exported programs return what the flow returns, in files that need no flowtrain."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from audit import randomize
from composed import configuration, options
from inprocess import flowtrain

import flowtrain as library
from flowtrain import flows
from flowtrain.bijections.ode import continuous_layers
from flowtrain.commands.export import _trace
from flowtrain.config.build import build_dataset, build_flow
from flowtrain.errors import FlowtrainError
from flowtrain.export import decompositions, formats, rows
from flowtrain.export.checks import Reference
from flowtrain.export.programs import Program
from flowtrain.export.tracing import trace
from flowtrain.runtime import checkpoint

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def example(*overrides):
    """A small flow that is not at its start, in float32, and its data's specification."""
    config = configuration(*overrides, "smoke=true")
    spec = build_dataset(config).spec
    flow = randomize(build_flow(config, spec, "cpu"), 0.02).float().requires_grad_(False)
    return flow, spec


def difference(flow, spec, what, to) -> tuple[float, float]:
    """The greatest difference of a program, and the tolerance."""
    reference = Reference(Program(flow, what).eval(), spec)
    exported = _trace(reference.program, reference)
    _, run = (formats.to_onnx if to == "onnx" else formats.to_torch_export)(exported, {"what": what})
    return reference.difference(run), reference.tolerance


CONTINUOUS = {
    "cnf",
    "cnf_image",
    "ffjord",
    "ffjord_image",
    "hybrid",
    "hybrid_image",
    "custom",
    "residual",
    "residual_image",
}
DISCRETE = [name for name in options("model") if name not in CONTINUOUS]
OTHER_TABLES = "bsds300", "hepmass", "miniboone", "power"  # gas stands for them: smoke=true makes their models alike
SOLVED = "ffjord", "matching"
# their layers are those of their models
LIKE_OTHERS = *OTHER_TABLES, "digits_best", "flowpp_cifar10", "jet_imagenet64", "mnist_best"
EXPERIMENTS = [name for name in options("experiment") if not name.startswith(SOLVED) and not name.endswith(LIKE_OTHERS)]
VECTORS = {
    "glow_vector",
    "realnvp_vector",
    "nsf_coupling",
    "nsf_autoregressive",
    "maf",
    "iaf",
    "made",
    "made_mog",
    "maf_mog",
}


@pytest.mark.parametrize("what, to", [("log_prob", "onnx"), ("score", "onnx"), ("sample", "torch_export")])
def test_a_program_of_images_returns_what_the_flow_returns(what, to):
    greatest, tolerance = difference(*example("model=glow", "dataset=digits"), what, to)
    assert greatest <= tolerance


@pytest.mark.parametrize("side", [14, 16])
def test_a_batch_may_be_as_large_as_a_side(side):
    flow = flows.glow((1, side, side), levels=1, steps=1, hidden=4)
    program = Program(randomize(flow).float(), "encode")
    x = torch.rand(20, 1, side, side)
    run = trace(program, {"x": x}).module()
    for size in (1, side, 20):
        torch.testing.assert_close(run(x=x[:size]), program(x[:size]))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["log_prob", "sample"])
@pytest.mark.parametrize("model", [name for name in DISCRETE if "custom" not in name])
def test_every_discrete_model_is_exported(model, what):
    data = "dataset=moons" if model in VECTORS else "dataset=digits"
    greatest, tolerance = difference(*example(f"model={model}", data), what, "onnx")
    assert greatest <= tolerance


@pytest.mark.long
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_discrete_experiment_is_exported(name):
    data = (
        ["dataset=moons"]
        if name.endswith("gas")
        else ["dataset=synthetic", "dataset.context=null", "dataset.warp=0", "dataset.shape=[3,8,8]"]
    )
    greatest, tolerance = difference(*example(f"experiment={name}", *data), "log_prob", "torch_export")
    assert greatest <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("model, data", [("iaf", "digits"), ("made_mog", "moons"), ("nsf_coupling", "moons")])
@pytest.mark.parametrize("what", ["encode", "score"])
def test_gradients_and_latents_of_inverses(model, data, what):
    greatest, tolerance = difference(*example(f"model={model}", f"dataset={data}"), what, "onnx")
    assert greatest <= tolerance


def test_a_long_autoregressive_inverse_is_a_loop():
    flow, spec = example("model=maf", "dataset=digits")
    reference = Reference(Program(flow, "sample").eval(), spec)
    exported = _trace(reference.program, reference)
    assert any("while_loop" in str(node.target) for node in exported.graph.nodes)
    _, run = formats.to_onnx(exported, {"what": "sample"})
    assert reference.difference(run) <= 1e-5


def test_a_gradient_goes_through_a_loop():
    flow, spec = example("model=iaf", "dataset=digits")
    reference = Reference(Program(flow, "score").eval(), spec)
    exported = _trace(reference.program, reference)
    assert sum("while_loop" == node.name.rstrip("_0123456789") for node in exported.graph.nodes) >= 2
    _, run = formats.to_torch_export(exported, {"what": "score"})
    assert reference.difference(run) <= 1e-4


def test_a_wrong_program_is_far_from_the_flow():
    flow, spec = example("model=maf", "dataset=moons")
    reference = Reference(Program(flow, "log_prob").eval(), spec)
    assert reference.difference(lambda inputs: reference.program(*inputs.values())) == 0
    assert reference.difference(lambda inputs: reference.program(*inputs.values()) + 1e-3) > 1e-5
    assert reference.difference(lambda inputs: reference.program(*inputs.values()) * torch.nan) == torch.inf


def test_rows_where_the_inverse_bursts_are_left_out(monkeypatch):
    flow, spec = example("model=glow", "dataset=digits")
    program = Program(flow, "log_prob").eval()
    assert len(rows.draw_inputs(program, spec, 300, 0)["x"]) == 300
    monkeypatch.setattr(rows, "LARGEST", 0.98)  # of the range of the grey levels 0 to 16
    fewer = rows.draw_inputs(program, spec, 300, 0)
    assert 0 < len(fewer["x"]) == len(fewer["noise"]) < 300 and fewer["x"].isfinite().all()
    monkeypatch.setattr(rows, "LARGEST", 0.0)
    with pytest.raises(FlowtrainError, match="10 drawings found 0 of 1000"):
        Reference(program, spec)


def test_rows_reach_beyond_the_knots_of_splines():
    flow, spec = example("model=nsf_coupling", "dataset=moons")
    inputs = Reference(Program(flow, "log_prob").eval(), spec).inputs
    assert len(inputs["x"]) == 1000
    assert (flow.encode(inputs["x"]).abs().amax(1) > 3).sum() > 200


@pytest.mark.parametrize(
    "name, x, relative",
    [
        ("erfcx", torch.linspace(-3, 60, 2001), 1e-6),
        ("erfc", torch.linspace(-4, 4, 2001), 3e-6),
        ("erfinv", torch.linspace(-0.999999, 0.999999, 2001), 1e-6),
        ("ndtri", torch.linspace(1e-7, 1 - 1e-7, 2000), 2e-6),
        ("ndtr", torch.linspace(-4, 4, 2001), 3e-6),
    ],
)
def test_a_function_that_onnx_lacks(name, x, relative):
    exact = (torch.erfinv if name == "erfinv" else getattr(torch.special, name))(x.double())
    found = getattr(decompositions, name)(x).double()
    torch.testing.assert_close(found, exact, rtol=relative, atol=1e-7)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of a conditional table and one of images."""
    folder = tmp_path_factory.mktemp("export")
    random = np.random.default_rng(0)
    lines = ["size,kind,count,age"]
    lines += [f"{v:.4f},{'ab'[i % 2]},{i % 5},{30 + i % 7}" for i, v in enumerate(random.normal(size=300))]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    small = "smoke=true", "logger=none", "report=false"
    assert (
        flowtrain(
            folder, "train", "dataset=table", "dataset.path=table.csv", "dataset.context=[age]", "model=maf", *small
        )
        == 0
    )
    assert flowtrain(folder, "train", "model=nice", *small) == 0
    return folder


def run_of(folder, name) -> Path:
    (run,) = (folder / "outputs").glob(f"{name}/*")
    return run


ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flowtrain":
            raise ImportError("flowtrain is not here")

sys.meta_path.insert(0, Blocked())
import numpy as np
inputs = dict(np.load("inputs.npz"))
if sys.argv[1].endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1])
    result = session.run(None, inputs)[0]
else:
    import torch
    program = torch.export.load(sys.argv[1]).module()
    result = program(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
assert "flowtrain" not in sys.modules
np.save("result.npy", result)
"""


@pytest.mark.parametrize("to", ["onnx", "torch_export"])
def test_a_file_is_used_without_flowtrain(runs, tmp_path, to):
    """Of a table with a category, a count and a context column."""
    out = tmp_path / "exported"
    run = run_of(runs, "table-maf")
    assert flowtrain(runs, "export", f"ckpt={run}", f"to={to}", "what=log_prob", f"output={out}") == 0
    (file,) = out.glob("log_prob.*")
    flow = library.load(run)
    x = torch.tensor([[0.3, 1, 4], [-2.0, 0, 0], [9.0, 1, 2]])
    noise, context = torch.full((3, 3), 0.25), torch.randn(3, 1)
    np.savez(tmp_path / "inputs.npz", x=x.numpy(), noise=noise.numpy(), context=context.numpy())
    command = [sys.executable, "-I", "-c", ALONE, str(file)]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PATH": "/usr/bin"})
    expected = Program(flow, "log_prob")(x, noise, context)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "result.npy")), expected, atol=1e-5, rtol=1e-5)


def test_a_file_says_what_it_is(runs, tmp_path, capsys):
    run = run_of(runs, "table-maf")
    assert flowtrain(runs, "export", f"ckpt={run}", "what=[sample]", f"output={tmp_path}/a") == 0
    import onnx

    model = onnx.load(tmp_path / "a/sample.onnx")
    record = json.loads({item.key: item.value for item in model.metadata_props}["flowtrain"])
    assert [item.name for item in model.graph.input] == [*record["inputs"]] == ["noise", "context"]
    assert [column["name"] for column in record["columns"]["modelled"]] == ["size", "kind", "count"]
    assert record["config"]["model"]["_target_"] == "flowtrain.flows.maf"
    readme = (tmp_path / "a/README.md").read_text()
    assert "kind, categorical: 0 a, 1 b" in readme and "No figures" not in readme.split("## Figures")[0]
    assert re.search(r"sample\s+\S*sample.onnx\s+[\d,]+ KiB", capsys.readouterr().out)


def test_a_program_that_differs_is_refused(runs, tmp_path, monkeypatch):
    trace = formats.to_torch_export

    def wrong(program, record):
        data, run = trace(program, record)
        return data, lambda inputs: run(inputs) + 0.01

    monkeypatch.setattr(formats, "to_torch_export", wrong)
    run = run_of(runs, "digits-nice")
    with pytest.raises(
        FlowtrainError, match="what=encode: the program differs from the flow by 0.0.* nothing is written"
    ):
        flowtrain(runs, "export", f"ckpt={run}", "to=torch_export", "what=encode", f"output={tmp_path}/a")
    assert not (tmp_path / "a").exists()
    assert not list((run / "export").glob("*/*"))


def test_an_adaptive_solver_is_refused_and_a_fixed_one_offered(tmp_path):
    assert (
        flowtrain(tmp_path, "train", "model=ffjord", "dataset=moons", "smoke=true", "logger=none", "report=false") == 0
    )
    with pytest.raises(FlowtrainError, match="solver=rk4 solver_steps=32"):
        flowtrain(tmp_path, "export")
    words = "solver=rk4", "solver_steps=4", "to=torch_export", "what=[log_prob,sample]"
    assert flowtrain(tmp_path, "export", *words, "output=out") == 0
    flow = library.load(run_of(tmp_path, "moons-ffjord"))
    program = torch.export.load(tmp_path / "out/log_prob.pt2").module()
    for layer in continuous_layers(flow):
        layer.solver, layer.steps = "rk4", 4
    x = torch.randn(9, 2)
    torch.testing.assert_close(program(x=x), Program(flow, "log_prob")(x), atol=1e-5, rtol=1e-5)


# ---- safetensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["table-maf", "digits-nice"])
def test_weights_in_safetensors_have_the_same_likelihoods(runs, tmp_path, name):
    run = run_of(runs, name)
    assert flowtrain(runs, "export", f"ckpt={run}", "to=safetensors", f"output={tmp_path}/a") == 0
    file = tmp_path / "a/model.safetensors"
    one, other = library.load(run), library.load(file)
    context = torch.randn(4, 1) if name == "table-maf" else None
    x = torch.tensor([[0.3, 1, 4]] * 4) if name == "table-maf" else torch.arange(256).reshape(4, 1, 8, 8) % 17
    inputs = [x.float(), *([] if context is None else [context])]
    assert torch.equal(Program(one, "encode")(*inputs), Program(other, "encode")(*inputs))
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    if name == "digits-nice":
        assert flowtrain(runs, "eval", f"ckpt={file}") == 0


def test_a_strange_safetensors_file_is_refused_in_one_line(runs, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FlowtrainError, match="no configuration of flowtrain in it"):
        library.load(tmp_path / "model.safetensors")
    state = checkpoint.read(next(run_of(runs, "digits-nice").glob("checkpoints/best.pt")))
    state["config"]["model"]["_target_"] = "os.mkdir"
    record = {"config": state["config"], "columns": None, "weights": "raw", "version": "0"}
    save_file(state["model"], tmp_path / "b.safetensors", {"flowtrain": json.dumps(record)})
    with pytest.raises(FlowtrainError, match="is not allowed"):
        library.load(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    with pytest.raises(FlowtrainError, match="cannot be read"):
        library.load(tmp_path / "c.safetensors")
