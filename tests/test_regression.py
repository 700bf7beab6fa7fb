"""The layer that starts from a linear regression on the context."""

from functools import partial

import pytest
import torch
from inprocess import flowtrain

from flowtrain import bijections as b
from flowtrain import flows
from flowtrain.bijections.regression import ridge
from flowtrain.cli.exit_codes import WorkerError


def test_it_starts_from_the_least_squares_where_rows_are_many():
    torch.manual_seed(0)
    context, weight = torch.randn(2000, 3), torch.randn(2, 3)
    x = context @ weight.T + torch.tensor([5.0, -7.0]) + 0.1 * torch.randn(2000, 2)
    found, bias = ridge(x, context)
    expected = torch.linalg.lstsq(torch.cat([context, torch.ones(2000, 1)], 1), x).solution.T
    assert torch.allclose(torch.cat([found, bias[:, None]], 1), expected.double(), atol=1e-4)


def test_the_penalty_predicts_fresh_rows_better_than_least_squares_where_rows_are_few():
    torch.manual_seed(0)
    context = torch.randn(4000, 40)
    x = 0.1 * context[:, :2] + torch.randn(4000, 2)
    weight, bias = ridge(x[:50], context[:50])
    error = (x[50:] - context[50:] @ weight.T.float() - bias.float()).square().mean()
    constant = (x[50:] - x[:50].mean(0)).square().mean()
    plain = torch.linalg.lstsq(context[:50], x[:50]).solution
    assert error < 1.05 * constant < (x[50:] - context[50:] @ plain).square().mean()


def test_units_do_not_matter():
    torch.manual_seed(0)
    context, units = torch.randn(60, 8), 10.0 ** torch.arange(-4, 4)
    x = context[:, :2] + torch.randn(60, 2)
    weight, bias = ridge(x, context)
    scaled, shifted = ridge(x, context * units)
    assert torch.allclose(scaled * units, weight, rtol=1e-4) and torch.allclose(shifted, bias, rtol=1e-4)


def test_more_numbers_than_rows_and_numbers_that_are_constant_are_no_obstacle():
    torch.manual_seed(0)
    for context in (
        torch.randn(5, 30),
        torch.ones(9, 4),
        torch.randn(9, 1).expand(9, 4),
        torch.full((9, 2), 0.1),
        torch.randn(1, 2),
    ):
        weight, bias = ridge(torch.randn(len(context), 2), context)
        assert weight.isfinite().all() and weight.abs().max() < 100 and bias.isfinite().all()


def test_a_flow_starts_it_from_its_first_batch_in_both_directions():
    torch.manual_seed(0)
    context = torch.randn(500, 3)
    x = context @ torch.randn(3, 2) + 0.1 * torch.randn(500, 2)
    for layer in (b.Regression, partial(b.Inverse, bijection=b.Regression)):
        flow = flows.nsf_coupling((2,), preprocess=layer, context_shape=(3,), hidden=8)
        flow.initialize(x, context)
        regression = next(module for module in flow.modules() if isinstance(module, b.Regression))
        assert regression.started
        z, _ = flow.bijection.layers()["preprocess"](x, context)
        assert z.std(0).max() < 0.15 and z.mean(0).abs().max() < 1e-3
        before = regression.weight.clone()
        flow.initialize(x + context[:, :2], context)
        assert torch.equal(regression.weight, before)


@pytest.mark.parametrize(
    "shape, context_shape, word",
    [((2, 3, 3), (4,), "vectors"), ((2,), (1, 3, 3), "vectors"), ((2,), None, "needs a context")],
)
def test_it_takes_vectors_and_needs_a_context(shape, context_shape, word):
    with pytest.raises(ValueError, match=word):
        b.Regression(shape, context_shape=context_shape)


def test_a_run_with_a_context_starts_from_the_regression_and_one_without_is_refused(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(300, 2)
    rows = torch.cat([x @ torch.tensor([[3.0], [-1.0]]) + 0.1 * torch.randn(300, 1), x], 1)
    (tmp_path / "rows.csv").write_text("y,a,b\n" + "\n".join(",".join(map(str, row)) for row in rows.tolist()) + "\n")
    command = ["train", "dataset=table", "dataset.path=rows.csv", "model=nsf_coupling", "preprocess=regression"]
    command += ["model.hidden=8", "max_steps=1", "logger=none"]
    assert flowtrain(tmp_path, *command, "dataset.context=[a,b]", "hydra.run.dir=run") == 0
    weights = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["model"]
    (weight,) = (value for name, value in weights.items() if name.endswith("regression.weight"))
    std = rows.std(0)
    assert torch.allclose(weight[0], torch.tensor([3.0, -1.0]) * std[1:] / std[0], atol=0.05)
    with pytest.raises(WorkerError, match="preprocess: .*needs a context"):
        flowtrain(tmp_path, *command, "hydra.run.dir=refused")
