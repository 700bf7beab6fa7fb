"""Every model file and every experiment: that it composes, has the parameters it states, and is exact."""

import inspect
import json
from functools import partial

import pytest
import torch
from audit import assert_exact, randomize
from composed import IMAGES, ONLY_IMAGES, VECTORS, configuration, flow_of, options, parameters

from flowtrain import bijections as b
from flowtrain import flows
from flowtrain.config.compose import conf_dir
from flowtrain.distributions import StandardNormal
from flowtrain.errors import UsageError

# What the presets have, beside the papers' or their reference code's count; docs/presets.md explains differences.
COUNTS = json.loads((conf_dir().parent / "tests/parameter_counts.json").read_text())


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiments_have_their_parameter_count(experiment):
    assert parameters(flow_of(f"experiment={experiment}", device="meta")) == COUNTS[experiment]


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


UNIVARIATE = ["glow", "realnvp", "nice", "maf", "iaf", "made", "nsf_coupling", "nsf_autoregressive", "nsf_image"]


@pytest.mark.parametrize("model", UNIVARIATE)
@pytest.mark.parametrize("univariate", options("univariate"))
def test_every_model_takes_every_univariate_map(model, univariate):
    if univariate == "affine_tanh" and model in ("maf", "iaf", "made", "nsf_autoregressive"):
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
    ],
)
def test_exact_on_3x8x8(make):
    """The whole flow without preprocessing, against the autograd Jacobian."""
    bijection = randomize(make((3, 8, 8)).bijection, scale=0.03)
    assert_exact(bijection, 0.3 * torch.randn(2, 3, 8, 8, dtype=torch.float64))


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
    knobs = {name: value for name, value in config.model.items() if not isinstance(value, dict) and name in defaults}
    assert knobs == {name: defaults[name] for name in knobs} and len(knobs) >= len(config.model) - 2
    if model in ("made_mog", "custom_image", "custom"):  # the constructor of another, with other parts
        return
    for name in ("univariate", "mixing", "norm", "base"):
        if name in defaults:
            assert config.parts[name]["_target_"].endswith(f".{defaults[name].__name__}")
