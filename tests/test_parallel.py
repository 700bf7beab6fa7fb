"""Two processes with gloo: the all-reduces of a step, and a bad step in one process is a bad step in both."""

import math
import warnings
from functools import partial

import pytest
import torch
from composed import flow_of
from ranks import run_on_two_ranks
from test_engine import SHAPE, Batches, config, small_flow
from torch.profiler import ProfilerActivity, profile

from flowtrain import bijections as b
from flowtrain import nets
from flowtrain.data.batch import Batch
from flowtrain.engine.agreement import agree
from flowtrain.engine.budget import Budget
from flowtrain.engine.compiling import compile_flow
from flowtrain.engine.loggers import Loggers
from flowtrain.engine.objectives import BitsPerDim
from flowtrain.engine.previews import Previews
from flowtrain.engine.saving import Checkpoints
from flowtrain.engine.schedules import Constant
from flowtrain.engine.trainer import Trainer
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.engine.validation import Validation
from flowtrain.flow import Flow
from flowtrain.runtime import distributed

STEPS = 4


def ode_flow(adjoint):
    torch.manual_seed(0)
    net = partial(nets.ODENet, hidden=8, depth=1)
    layers = {
        "ode": partial(b.Continuous, net=net, adjoint=adjoint, rtol=1e-3, atol=1e-3),
        "norm": b.BatchNorm,  # its moments are those of both processes
        "coupling": partial(b.Coupling, univariate=b.SigmoidAffine, net=partial(nets.MLP, hidden=8)),
    }
    return Flow(SHAPE, partial(b.Chain, layers=layers))


class Slices(Batches):
    """This process's half of each batch; process 1's is not finite at the steps of ``poison``."""

    def batches(self, step=0):
        half = self.batch_size // 2
        for x, *_ in Batches().batches(step):
            x = x[distributed.rank() * half :][:half].float()
            yield Batch(x / math.nan if step in self.poison and distributed.rank() else x)
            step += 1


def trainer(folder, flow, poison=(), max_steps=30, **changes):
    return Trainer(
        flow,
        BitsPerDim(),
        Slices(poison),
        torch.optim.Adam(flow.parameters(), 1e-3, fused=True),
        config(**changes),
        budget=Budget(max_steps, None),
        schedule=Constant(),
        validation=Validation(lambda _flow: None, BitsPerDim()),
        previews=Previews(lambda _flow: None),
        checkpoints=Checkpoints(folder, {}),
        loggers=Loggers(),
    )


def count_reductions(folder, accumulate):
    """The number of all-reduces in each step, for a flow whose gradients fit in one bucket."""
    flow = small_flow()
    del flow.bijection.norm  # it reduces its moments
    one, counts = trainer(folder, flow, accumulate=accumulate), []
    for x in [next(one.loader.batches(step)) for step in range(STEPS)]:
        with profile(activities=[ProfilerActivity.CPU]) as record:
            one.update(agree(*one.gradient(x), 0, 0.0))
        one.step += 1
        counts.append(sum(event.count for event in record.key_averages() if event.key == "c10d::allreduce_"))
    return counts[1:]  # DDP rebuilds its buckets in the first step


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.long), 4])
def test_a_step_reduces_its_gradients_once_and_its_metrics_once(accumulate, tmp_path):
    for counts in run_on_two_ranks(partial(count_reductions, accumulate=accumulate), tmp_path):
        assert counts == [2] * (STEPS - 1)


def warnings_of_gradients(folder):
    """What torch says about the gradients of a Real NVP of images, whose networks are of convolutions."""
    torch.set_warn_always(True)
    flow, x = flow_of("model=realnvp", "dataset=digits", "smoke=true"), torch.randint(0, 17, (4, 1, 8, 8))
    flow.initialize(x)
    training_pass = TrainingPass(flow, BitsPerDim(), seed=0)
    training_pass.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(2):
            flow.zero_grad()
            training_pass.backpropagate(Batch(x), step, distributed.rank(), 2)
    return [str(one.message) for one in said if "trides" in str(one.message)]


def test_gradients_have_the_layout_of_their_buckets(tmp_path):
    """Otherwise each is copied in each step, and torch warns of it."""
    assert run_on_two_ranks(warnings_of_gradients, tmp_path) == [[], []]


def train_with_a_bad_step(folder, adjoint, accumulate):
    flow = ode_flow(adjoint=adjoint)
    one = trainer(folder, flow, poison=[1], accumulate=accumulate)
    for step in range(STEPS):
        before = [parameter.clone() for parameter in flow.parameters()]
        agreed = agree(*one.gradient(next(one.loader.batches(step))), 0, 0.0)
        one.update(agreed)
        loss, *_ = agreed.read()
        one.step += 1
        assert (one.recovery.skipped == 0) == (step < 1) and math.isnan(loss) == (step == 1)
        assert all(map(torch.equal, before, flow.parameters())) == (step == 1)
    return one.recovery.skipped, [parameter.detach() for parameter in flow.parameters()]


@pytest.mark.parametrize(
    ("adjoint", "accumulate"),
    [(True, 2), pytest.param(True, 1, marks=pytest.mark.long), pytest.param(False, 1, marks=pytest.mark.long)],
)
def test_an_ode_that_one_process_cannot_solve_is_a_bad_step_of_both(adjoint, accumulate, tmp_path):
    (skipped, weights), (other, others) = run_on_two_ranks(
        partial(train_with_a_bad_step, adjoint=adjoint, accumulate=accumulate), tmp_path
    )
    assert skipped == other == 1
    assert all(map(torch.equal, weights, others))
    assert all(one.isfinite().all() for one in weights)


def compare_compiled_steps(folder):
    """The compiled graphs, and the metrics of three steps, eager and compiled."""
    from torch._dynamo.backends import registry

    registry.get_default_backend = lambda: "aot_eager"  # a C++ compiler takes long
    net = partial(nets.MADE, hidden=16, depth=1)
    layers = {"ar": partial(b.Autoregressive, univariate=b.ExpAffine, net=net), "norm": b.BatchNorm}
    chain = partial(b.Chain, layers={"steps": partial(b.Chain, layers=layers, repeat=2)})
    figures, graphs = [], []
    for compile in (lambda flow: None, lambda flow: graphs.append(compile_flow(flow))):
        torch.manual_seed(0)
        flow = Flow(SHAPE, chain)
        one = trainer(folder, flow)
        compile(flow)
        for step in range(3):
            figures.append(agree(*one.gradient(next(one.loader.batches(step))), 0, 0.0).read()[:2])
    return graphs[0].graphs, torch.tensor(figures).chunk(2)


@pytest.mark.long
def test_batch_norm_over_two_processes_compiles(tmp_path):
    for graphs, (eager, compiled) in run_on_two_ranks(compare_compiled_steps, tmp_path):
        assert graphs
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)
