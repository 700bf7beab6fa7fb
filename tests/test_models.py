"""Every model file and every experiment: that it composes, has the parameters it states, and is exact."""

import inspect
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from audit import assert_exact, randomize
from composed import IMAGES, ONLY_IMAGES, VECTORS, configuration, flow_of, options, parameters
from omegaconf import OmegaConf

from flowtrain import bijections as b
from flowtrain import flows
from flowtrain.config.compose import conf_dir
from flowtrain.data.spec import DataSpec
from flowtrain.distributions import StandardNormal
from flowtrain.errors import UsageError

# What the presets have, beside the papers' or their reference code's count; docs/presets.md explains differences.
COUNTS = json.loads((conf_dir().parent / "tests/parameter_counts.json").read_text())


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiments_have_their_parameter_count(experiment):
    assert parameters(flow_of(f"experiment={experiment}", device="meta")) == COUNTS[experiment]


def test_experiments_with_large_checkpoints_save_by_the_clock():
    """A checkpoint holds at least three numbers for each parameter: 120 MB for ten million."""
    files = {name: OmegaConf.load(conf_dir() / f"experiment/{name}.yaml") for name in COUNTS}
    by_the_clock = {name for name, keys in files.items() if keys.trainer.get("save_every", 500) is None}
    assert by_the_clock == {name for name, count in COUNTS.items() if count > 10_000_000}
    assert not any("save_minutes" in files[name].trainer for name in by_the_clock)  # 15, as everywhere


@pytest.mark.slow
@pytest.mark.parametrize("model", options("model"))
@pytest.mark.parametrize("dataset", IMAGES)
def test_every_model_fits_every_image(model, dataset):
    flow = flow_of(f"model={model}", f"dataset={dataset}", device="meta")
    assert flow.bijection.out_shape == (flow.dimensions,)


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted({*options("model")} - {*ONLY_IMAGES}))
@pytest.mark.parametrize("dataset", VECTORS)
def test_every_other_model_fits_every_vector(model, dataset):
    flow = flow_of(f"model={model}", f"dataset={dataset}", device="meta")
    assert flow.bijection.out_shape == (flow.dimensions,)


@pytest.mark.parametrize("model", ONLY_IMAGES)
def test_a_model_of_images_says_so_of_vectors(model):
    with pytest.raises(UsageError, match="takes images"):
        flow_of(f"model={model}", "dataset=moons", device="meta")


UNIVARIATE = "glow realnvp nice maf iaf made nsf_coupling nsf_autoregressive nsf_image tarflow flowpp jet".split()


@pytest.mark.parametrize("model", UNIVARIATE)
@pytest.mark.parametrize("univariate", options("univariate"))
def test_every_model_takes_every_univariate_map(model, univariate):
    if univariate == "affine_tanh" and model in ("maf", "iaf", "made", "nsf_autoregressive", "tarflow"):
        pytest.skip("it has weights of its own, which an autoregressive layer refuses")
    flow = flow_of(f"model={model}", f"univariate={univariate}", "model.hidden=8")
    kind = configuration(f"univariate={univariate}").parts["univariate"]["_target_"].rsplit(".", 1)[1]
    assert any(type(module).__name__ == kind for module in flow.bijection.modules())


TINY_GLOW = partial(flows.glow, steps=1, hidden=4)


@pytest.mark.parametrize(
    "make",
    [
        partial(TINY_GLOW, levels=2),
        partial(TINY_GLOW, levels=2, mixing=b.DenseLinear, univariate=b.Additive),
        partial(TINY_GLOW, levels=1, mixing=b.Shuffle, norm=b.BatchNorm),
        partial(flows.realnvp, levels=2, hidden=2),
        partial(flows.realnvp, levels=2, hidden=2, norm=b.ActNorm, univariate=b.SigmoidAffine),
        partial(flows.nice, hidden=4, base=StandardNormal),
        partial(flows.flowpp, hidden=4, heads=2, blocks=1, couplings=(2, 2, 1)),
        partial(flows.jet, hidden=4, heads=2, patch=2, steps=3, spatial=2),
    ],
)
def test_exact_on_3x8x8(make):
    """The whole flow without preprocessing, against the autograd Jacobian."""
    bijection = randomize(make((3, 8, 8)).bijection, scale=0.03)
    assert_exact(bijection, 0.3 * torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_shapes_alone_need_no_compiler():
    """A flow on the meta device, as checkpoints are checked: torch's compiler takes as long to import as torch."""
    words = [[f"model={name}", "dataset=digits"] for name in options("model")]
    code = f"import sys; from composed import flow_of; [flow_of(*each, device='meta') for each in {words}]; "
    code += "sys.exit(' '.join({'torch._dynamo', 'sympy'} & {*sys.modules}) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("model", options("model"))
def test_a_new_flow_of_every_model_gives_every_parameter_a_gradient(model):
    flow = flow_of(f"model={model}").train()
    x = torch.randint(0, 17, (8, 1, 8, 8), dtype=torch.uint8)
    flow.initialize(x)
    optimizer = torch.optim.SGD(flow.parameters(), 1e-3)
    for _ in range(3):  # zero-initialised layers hide those before them in the first step
        optimizer.zero_grad()
        flow.bits_per_dim(x).mean().backward()
        optimizer.step()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("model", options("model"))
def test_a_model_file_has_the_defaults_of_its_constructor(model):
    """Its scalars are the constructor's, and so are the parts that it chooses, such as univariate and base."""
    config = configuration(f"model={model}")
    constructor = getattr(flows, config.model["_target_"].rpartition(".")[2])
    defaults = {name: one.default for name, one in inspect.signature(constructor).parameters.items()}
    defaults = {name: list(one) if isinstance(one, tuple) else one for name, one in defaults.items()}
    knobs = {name: value for name, value in config.model.items() if not isinstance(value, dict) and name in defaults}
    assert knobs == {name: defaults[name] for name in knobs} and len(knobs) >= len(config.model) - 2
    if model in ("made_mog", "nsf_affine", "custom_image", "custom"):  # the constructor of another, with other parts
        return
    for name in ("univariate", "mixing", "norm", "base"):
        if name in defaults:
            assert config.parts[name]["_target_"].endswith(f".{defaults[name].__name__}")


@pytest.mark.parametrize("sides", [(32, 48), (28, 30), (6, 10), (5, 7), (1, 64), (2, 2), (64, 16)])
@pytest.mark.parametrize("model", [*ONLY_IMAGES, "maf"])
def test_images_of_any_sides(model, sides):
    """A model builds, or says that it halves sides and these are odd."""
    words, spec = [f"model={model}"], DataSpec("images", (3, *sides), 256)
    if model == "custom_image":  # its file states the number of scales
        words.append("model.layers.scales.levels=1")
    if model in ("flowpp", "glow", "nsf_image", "hybrid_image", "custom_image") and (sides[0] % 2 or sides[1] % 2):
        with pytest.raises(UsageError, match="{}×{}.* cannot be halved".format(*sides)):
            flow_of(*words, spec=spec, device="meta")
    else:
        assert flow_of(*words, spec=spec, device="meta").bijection.out_shape == (3 * sides[0] * sides[1],)


@pytest.mark.parametrize(
    ("model", "levels", "sides", "says"),
    [
        ("glow", 5, (32, 48), r"at most 4: the sides can be halved 4 times \(32×48 → 16×24 → 8×12 → 4×6 → 2×3\)"),
        ("nsf_image", 2, (28, 30), r"at most 1: the sides can be halved 1 time \(28×30 → 14×15\)"),
        ("realnvp", 3, (28, 30), r"at most 2: the sides can be halved 1 time \(28×30 → 14×15\)"),
        ("ffjord_image", 2, (5, 7), r"at most 1: the sides can be halved 0 times \(5×7\)"),
    ],
)
def test_too_many_levels_say_how_often_sides_can_be_halved(model, levels, sides, says):
    words, spec = [f"model={model}", f"model.levels={levels}"], DataSpec("images", (3, *sides), 256)
    with pytest.raises(UsageError, match=f"model.levels={levels}: levels={levels} must be {says}"):
        flow_of(*words, spec=spec, device="meta")
    flow_of(f"model={model}", f"model.levels={levels - 1}", spec=spec, device="meta")


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 6), (1, 2, 3)])
def test_realnvp_is_exact_on_odd_sides(shape):
    bijection = randomize(flows.realnvp(shape, hidden=2, norm=b.ActNorm).bijection, scale=0.03)
    assert_exact(bijection, 0.3 * torch.randn(2, *shape, dtype=torch.float64))
