"""Every model file and every experiment: that it composes, has the parameters it states, and is exact."""

import json

import pytest
import torch
from audit import assert_exact, randomized
from composed import IMAGES, ONLY_IMAGES, VECTORS, configuration, flow_of, options, parameters

from flowtrain.config.compose import conf_dir
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
    with pytest.raises(UsageError, match=r"image|levels"):
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


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=glow", "model.levels=2", "model.steps=1", "model.hidden=4"],
        ["model=glow", "model.levels=2", "model.steps=1", "model.hidden=4", "mixing=plain", "univariate=additive"],
        ["model=glow", "model.levels=1", "model.steps=1", "model.hidden=4", "mixing=shuffle", "norm=batchnorm"],
        ["model=realnvp", "model.levels=2", "model.hidden=2"],
        ["model=realnvp", "model.levels=2", "model.hidden=2", "norm=actnorm", "univariate=affine"],
        ["model=nice", "model.hidden=4", "base=normal"],
    ],
    ids=" ".join,
)
def test_exact_on_3x8x8(overrides):
    """The whole flow after its preprocessing, against the autograd Jacobian."""
    flow = flow_of("dataset=synthetic", "dataset.image_size=8", "dataset.shape=[3,8,8]", *overrides)
    layers = [layer for name, layer in flow.bijection.named_children() if name != "preprocess"]
    chain = flow.bijection
    del chain.preprocess
    assert list(chain) == layers
    chain.exact = True
    assert_exact(randomized(chain, scale=0.03), 0.3 * torch.randn(2, 3, 8, 8, dtype=torch.float64))


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
