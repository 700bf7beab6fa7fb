"""Several processes: the collectives over NCCL in a world of one, and two processes on one GPU over gloo."""

from __future__ import annotations

import copy
import os
import warnings
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowtrain.engine.training_pass import synchronize_gradients
from flowtrain.runtime import distributed
from on_gpu.part import Part, Place, verdict
from on_gpu.training import launches, take_steps, trainer_of

LIMIT = 1e-3  # of the loss, in bits/dim or nats
STEPS = 10


def world_of_one(place: Place) -> dict:
    """Send what flowtrain sends, on the kinds of tensors that it sends, and train with synchronized gradients."""
    words = ["model=realnvp", "dataset=digits", "smoke=true", "compile=false", *launches(graph=False)]
    trainer = trainer_of(place, *words)
    flow, x = trainer.flow, next(trainer.loader.batches()).x
    backend = "cpu:gloo,cuda:nccl" if place.device.type == "cuda" else "gloo"
    store = dist.FileStore(str(place.folder / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    sent = [torch.ones(3, device=where, dtype=torch.float64) for where in ("cpu", place.device)]
    with patch.object(distributed, "world", lambda: 2):  # in a world of one, flowtrain sends nothing
        distributed.broadcast(flow.state_dict().values())
        sums = all(distributed.all_sum(one).tolist() == [1.0, 1.0, 1.0] for one in sent)
    kept = all(torch.equal(before[name], tensor) for name, tensor in flow.state_dict().items())
    objects: list = [None]
    dist.all_gather_object(objects, {"a": 1})
    y = torch.ones(2, device=place.device, requires_grad=True)
    torch.ops.flowtrain.all_reduce(y).sum().backward()
    expected, _ = gradients(copy.deepcopy(flow), x)
    found, told = gradients(synchronize_gradients(flow, static_graph=True), x)
    error = max((mine - true).abs().max().item() for mine, true in zip(found, expected, strict=True))
    dist.destroy_process_group()
    right = kept and sums and objects == [{"a": 1}] and y.grad is not None and error <= 1e-5
    return {"found": "; ".join([f"gradients differ by {error:.1g}", *told]), "passed": right}


def gradients(flow: nn.Module, x: Tensor) -> tuple[list[Tensor], list[str]]:
    """Gradients of the mean log-likelihood after some passes, and torch's warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            flow.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            flow(x).mean().backward()
    return [one.grad.clone() for one in flow.parameters()], sorted({str(one.message)[:200] for one in seen})


def one_gpu(place: Place, model: str) -> dict:
    """Train on two processes that share the device, and on one; their losses on each global batch."""
    words = [f"model={model}", "dataset=digits", "compile=false", *launches(graph=False)]
    words += ["smoke=true"] if place.tiny else ["batch_size=64"]
    alone = losses(place, words)
    method = "fork" if place.tiny else "spawn"
    torch.multiprocessing.start_processes(one_rank, (words, place), nprocs=2, start_method=method)
    together = torch.load(place.folder / "losses.pt")
    error = max(abs(one - other) for one, other in zip(alone, together, strict=True))
    return {"found": f"losses differ by {error:.1g}", "error": error, "passed": error <= LIMIT}


def losses(place: Place, words: list[str]) -> list[float]:
    trainer = trainer_of(place, *words, log_every=1)
    return [report[f"train/{trainer.objective.key}"] for report in take_steps(trainer, STEPS)]


def one_rank(rank: int, words: list[str], place: Place) -> None:
    """One of two processes on one device."""
    where = place.device
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", FLOWTRAIN_STORE=f"{place.folder}/store")
    distributed.device = lambda: where
    distributed._join("gloo")  # NCCL refuses two processes on one GPU
    found = losses(place, words)
    if rank == 0:
        torch.save(found, place.folder / "losses.pt")
    distributed.close()


MODELS = ("glow", "realnvp", "maf")
PART = Part(
    "processes",
    "The collectives over NCCL in a world of one process, with synchronized gradients; and two processes on one GPU "
    "over gloo beside one process, ten steps each (limit 0.001 bits/dim).",
    {
        "NCCL, a world of one": world_of_one,
        **{f"two processes on one GPU, model={one}": partial(one_gpu, model=one) for one in MODELS},
    },
    {"found": lambda row: row["found"], "passed": verdict},
    seconds=170,
    processes=2,
    rehearsed=("NCCL, a world of one", "two processes on one GPU, model=realnvp"),
)
