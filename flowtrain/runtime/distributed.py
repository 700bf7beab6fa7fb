"""The processes of a job. Environment variables of our launcher, torchrun or srun say which this one is."""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
import warnings
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from glob import glob

from flowtrain.errors import FlowtrainError, UsageError

PEER_FAILED = "a peer failed: it has ended, or did not answer for dist.timeout_s seconds"
PATIENCE = timedelta(hours=1)  # until a job starts; the launcher notices a process that has died


def _adopt_slurm() -> None:
    """Translate srun's environment variables to torchrun's."""
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    head, number = re.match(r"([^\[,]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"]).groups()
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env.setdefault("MASTER_ADDR", head + (number or ""))
    env.setdefault("MASTER_PORT", str(15000 + int(env["SLURM_JOB_ID"]) % 40000))


_adopt_slurm()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def gpus() -> int:
    """The number of visible GPUs. Imports no PyTorch where there is no driver."""
    if sys.platform == "linux" and not (glob("/dev/nvidia[0-9]*") or glob("/dev/dxg") or glob("/dev/kfd")):
        return 0
    import torch

    return torch.cuda.device_count()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(count: int) -> int:
    """The cores for each of ``count`` processes on this machine; at least one."""
    return max(1, cores() // count)


def processes(devices: int | str) -> int:
    """How many processes ``devices`` asks for on this machine. Raises UsageError if there are fewer devices."""
    if world() > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
        if devices not in ("auto", here, world()):
            raise UsageError(f"devices={devices}: this launcher started {world()} processes; leave devices=auto")
        return world()
    count = gpus()
    if devices == "auto":
        return max(1, count)
    most, kind = (count, "GPU") if count else (os.cpu_count() or 1, "CPU core")
    if devices > most:
        on_cpu = "; CUDA_VISIBLE_DEVICES= in front of the command computes on the CPU" if count else ""
        there = f"there {'is' if most == 1 else 'are'} {most} {kind}{'s' * (most > 1)}"
        raise UsageError(f"devices={devices}: {there}{on_cpu}")
    return devices


def device():
    """The torch.device of this rank; where a scheduler shows each process one GPU of its own, that one."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank() >= count > 1:
        raise UsageError(f"more processes than the {count} GPUs of this machine")
    return torch.device("cuda", local_rank() if count > 1 else 0)


def init() -> None:
    """Join the process group, where there is more than one process: gloo for the CPU, NCCL for GPUs."""
    if world() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        return
    where, backend, gpu = device(), "gloo", None
    if where.type == "cuda":
        import torch

        torch.cuda.set_device(where)
        backend, gpu = "cpu:gloo,cuda:nccl", where
        # NCCL's watchdog aborts a process that has lost another; pages about its state would hide our line
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    _run_in_thread(_join, backend, gpu)


def _join(backend: str, gpu=None) -> None:
    import torch.distributed as dist

    place = os.environ.get("FLOWTRAIN_STORE")  # of our own launcher; else MASTER_ADDR and MASTER_PORT
    meeting = dist.rendezvous(f"file://{place}" if place else "env://", rank(), world(), timeout=PATIENCE)
    store, _, _ = next(meeting)
    # torchrun keeps its store when it restarts processes, with the addresses of the ones that died
    attempt = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    bound = {}
    if gpu is not None:
        import torch

        torch.cuda.set_device(gpu)  # of this thread, which would open a context on the first GPU
        _refuse_shared_gpus(attempt, gpu)
        bound = {"device_id": gpu}  # NCCL connects at once
    try:
        dist.init_process_group(backend, store=attempt, rank=rank(), world_size=world(), timeout=PATIENCE, **bound)
    except dist.DistBackendError as error:
        *_, reason = str(error).strip().splitlines()
        raise PeerFailure(f"rank {rank()}: NCCL cannot connect the GPUs: {reason}") from error


def _refuse_shared_gpus(store, gpu) -> None:
    """Raise UsageError where two processes have the same GPU; NCCL would say so as if another process had failed."""
    import torch

    found = torch.cuda.get_device_properties(gpu)
    store.set_timeout(PATIENCE)
    store.set(f"gpu {rank()}", f"{platform.node()} {found.uuid} {found.pci_bus_id} {found.pci_device_id}")
    owners: dict[bytes, int] = {}
    for number in range(world()):
        other = owners.setdefault(store.get(f"gpu {number}"), number)
        if other != number:
            raise UsageError(f"processes {other} and {number} share a GPU: start at most one process for each GPU")


def _run_in_thread(work, *args) -> None:
    """Run work that waits in C++ in a thread, so that the main thread handles signals meanwhile."""
    done = Future()

    def run():
        try:
            done.set_result(work(*args))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    done.result()


def limit_waits(seconds: float) -> None:
    """Let a process fail that waits longer than this for another, which has stopped or hangs."""
    if world() > 1:
        from torch.distributed import distributed_c10d

        init()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # newer releases name it set_timeout
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


class PeerFailure(FlowtrainError):
    """Another process of the job has ended, or has not answered for too long."""


@contextmanager
def catch_peer_failures():
    """Raise PeerFailure for the errors of gloo and NCCL when another process has failed."""
    try:
        yield
    except RuntimeError as error:
        gloo = world() > 1 and re.search(r"gloo/|Connection (closed|reset) by peer|Timed out waiting", str(error))
        if gloo or type(error).__name__ == "DistBackendError":
            raise PeerFailure(f"rank {rank()}: {PEER_FAILED}") from error
        raise


def barrier() -> None:
    """Wait until every rank is here."""
    all_gather_object(None)


def broadcast_object(obj=None):
    """Rank 0's ``obj``, on every rank."""
    if world() == 1:
        return obj
    import torch
    import torch.distributed as dist

    init()
    box = [obj]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast(tensors) -> None:
    """Give every rank rank 0's values of ``tensors``, in place."""
    if world() > 1:
        import torch.distributed as dist

        init()
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def all_gather_object(obj) -> list:
    """Every rank's ``obj``, on every rank, in the order of ranks."""
    if world() == 1:
        return [obj]
    import torch.distributed as dist

    init()
    out = [None] * world()
    dist.all_gather_object(out, obj)
    return out


def all_sum(tensor):
    """``tensor`` summed over ranks, in place; returned."""
    if world() > 1:
        import torch.distributed as dist

        init()
        dist.all_reduce(tensor)
    return tensor


def close() -> None:
    """Leave the process group."""
    if world() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
