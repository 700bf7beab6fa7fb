"""Each of two processes with a share of the weights computes what one with all of them does."""

import copy
import re

import pytest
import torch
from inprocess import flowtrain
from ranks import run_on_two_ranks
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves_with_path

from flowtrain import flows
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.data import ArraySplit, evaluation_batches
from flowtrain.engine.ema import EMA
from flowtrain.engine.weights import Weights
from flowtrain.errors import UsageError
from flowtrain.runtime import distributed

DEVICE = torch.device("cpu")


def new_flow():
    torch.manual_seed(0)
    return flows.tarflow((1, 4, 4), patch=2, depths=(1, 2), hidden=8, heads=2).double()


def optimizer_of(flow):
    matrices = [one for one in flow.parameters() if one.dim() > 1]
    others = [one for one in flow.parameters() if one.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, fused=True)


def train(one, x, steps):
    norms = []
    for step in steps:
        for parameter in one.parameters:
            parameter.grad = None
        (-one.flow(x[step]).mean()).backward()
        norms.append(one.clip(0.5).item())
        one.step()
        one.update_average(step)
    return norms


def sharded_weights():
    from flowtrain.engine.sharded_weights import ShardedWeights, blocks, shard

    flow = new_flow()
    ema = EMA(flow, 0.9)
    outline = shard(flow, DEVICE)
    shard(ema.model, DEVICE)
    assert len(blocks(flow)) == 3
    return ShardedWeights(flow, optimizer_of(flow), ema, outline)


def compare(folder):
    """The states and norms of weights that are shared out and of those that are not; then of their continuations from
    each other's states; and a density of the average."""
    x, rank = torch.randn(5, 8, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double(), distributed.rank()
    half, found = x[:, 4 * rank : 4 * rank + 4], {}
    whole, shared = Weights(flow := new_flow(), optimizer_of(flow), EMA(flow, 0.9)), sharded_weights()
    assert shared.state_dict()["optimizer"] == whole.state_dict()["optimizer"]  # before a step: no state
    assert sum(one.to_local().numel() for one in shared.parameters) < sum(one.numel() for one in whole.parameters)
    found["norms"] = train(whole, x, range(3)), train(shared, half, range(3))
    found["states"] = [copy.deepcopy(one.state_dict()) for one in (whole, shared)]
    found["model"] = shared.model_state()
    average = shared.whole(shared.average)
    if distributed.is_main():
        with torch.no_grad():
            found["density"] = average(x[0]), whole.average(x[0])
    again = sharded_weights()
    again.load_state_dict(found["states"][1])  # what the others lack comes from the first
    train(again, half, range(3, 5))
    train(whole, x, range(3, 5))
    found["on"] = [one.state_dict() for one in (whole, again)]
    again.load_best(found["states"][0])
    found["best"] = again.state_dict()["model"]
    return found


def assert_same(one, other):
    for name in ("model", "ema"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-11)
    groups = [
        [group | {"betas": tuple(group["betas"])} for group in each["optimizer"]["param_groups"]]
        for each in (one, other)
    ]
    assert groups[0] == groups[1]
    torch.testing.assert_close(one["optimizer"]["state"], other["optimizer"]["state"], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_shares_are_trained_as_the_whole_and_their_states_are_exchanged(tmp_path):
    found, other = run_on_two_ranks(compare, tmp_path)
    assert found["norms"][1] == pytest.approx(found["norms"][0], rel=1e-9)
    assert other["norms"][1] == found["norms"][1]
    assert not [path for path, one in tree_leaves_with_path(found) if isinstance(one, DTensor)]
    assert_same(*found["states"])
    assert_same(*found["on"])
    assert found["states"][0]["optimizer"]["state"] and not other["states"][1]["model"]
    for model in (found["model"], other["model"]):
        torch.testing.assert_close(model, found["states"][1]["model"], rtol=0, atol=0)
    torch.testing.assert_close(*found["density"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["best"], found["states"][0]["ema"])
    plain = Weights(flow := new_flow(), optimizer_of(flow), EMA(flow, 0.9))
    plain.load_state_dict(found["states"][1])  # on one device
    assert_same(plain.state_dict(), found["states"][1])


@pytest.mark.parametrize(
    "words, line",
    [
        (
            ["model=glow"],
            "trainer.strategy=fsdp: gathers the blocks of transformers one after the other, and model=glow",
        ),
        (["model=tarflow", "compile=true"], "compile=true: not with trainer.strategy=fsdp"),
        (["model=tarflow", "memory=reversible"], "memory=reversible: not with trainer.strategy=fsdp"),
        (["model=tarflow", "trainer.strategy=zero"], "trainer.strategy=zero: must be"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_one_line(words, line, tmp_path):
    words = ["train", "trainer.strategy=fsdp", "dataset=digits", "smoke=true", *words]
    with pytest.raises((UsageError, WorkerError), match=re.escape(line)):
        flowtrain(tmp_path, *words)


def test_processes_have_as_many_batches():
    split = ArraySplit(torch.arange(5.0)[:, None], "numbers")
    for examples, size, world in ((5, 2, 2), (5, 2, 4), (1, 1, 3), (4, 2, 2)):
        each = [
            list(evaluation_batches(split, size, "cpu", rank, world, examples, as_many=True)) for rank in range(world)
        ]
        assert len({len(batches) for batches in each}) == 1
        indices = torch.cat([index for batches in each for index, *_ in batches])
        assert len(indices) == examples == len({*indices.tolist()})
        assert all(len(index) == len(x) for batches in each for index, x, _ in batches)


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_and_evaluated_by_one(tmp_path):
    words = "model=tarflow dataset=digits model.depths=[1,1] model.hidden=8 batch_size=8 logger=none".split()
    words += ["trainer.val_every=2", "trainer.val_examples=3", "trainer.sample_n=2", "trainer.sample_every=2"]
    words += ["devices=2", "trainer.strategy=fsdp", "max_steps=2", "hydra.run.dir=run"]
    assert flowtrain(tmp_path, "train", *words) == 0
    assert (tmp_path / "run" / "samples" / "samples_00000002.png").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=3", "devices=2") == 0
    assert flowtrain(tmp_path, "train", "resume=run", "max_steps=4", "devices=1") == 0
    assert flowtrain(tmp_path, "eval", "ckpt=run", "devices=1") == 0
