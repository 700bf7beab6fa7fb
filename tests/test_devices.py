"""What happens on GPUs, on a fake torch.cuda: which devices processes take, precision, too little memory, profiles."""

import json
import os
import re
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import inprocess
import numpy as np
import pytest
import torch
import torch.distributed as dist
from composed import configuration
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from flowtrain import train
from flowtrain.cli import jobs, launcher
from flowtrain.cli.exit_codes import WorkerError
from flowtrain.commands import COMMANDS
from flowtrain.config.schema import check_batch_size
from flowtrain.data.spec import DataSpec
from flowtrain.engine import evaluate, precision, profile
from flowtrain.engine.auto import choose_batch_size
from flowtrain.engine.out_of_memory import out_of_memory
from flowtrain.engine.precision import autocast_dtype
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.errors import OutOfMemory, UsageError
from flowtrain.runtime import distributed
from flowtrain.runtime.distributed import PeerFailure
from flowtrain.training import setup
from flowtrain.training.optimizer import build_optimizer, check_optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TINY = ("dataset=digits", "smoke=true", "logger=none", "report=false")
TABLE = DataSpec("table", (2,))


@pytest.fixture(autouse=True)
def torch_as_it_was():
    with precision.tf32_as("float32"):
        torch.backends.cudnn.allow_tf32 = True  # torch's default, whatever ran before
        yield


@pytest.fixture
def gpus(monkeypatch):
    """``gpus(count, major)``: torch.cuda of a machine with so many GPUs of that compute capability."""

    def fake(count, major=9):
        monkeypatch.setattr(distributed, "gpus", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        one = SimpleNamespace(major=major, minor=0, uuid="GPU-0", pci_bus_id=1, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: one)

    return fake


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    train.main(configuration("model=nice", *TINY), str(folder))
    return folder


def switches():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


# ---- precision


@pytest.mark.parametrize(("major", "name"), [(7, "bfloat16"), (7, "tf32"), (9, "bfloat16"), (9, "tf32")])
def test_emulated_arithmetic_is_none(gpus, major, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _device: True)  # as on a V100 or T4
    gpus(1, major)
    if major < 8:
        with pytest.raises(UsageError, match=rf"precision={name}: this GPU has no .* use precision=float32"):
            autocast_dtype(name, GPU)
    else:
        assert autocast_dtype(name, GPU) == (torch.bfloat16 if name == "bfloat16" else None)


def test_a_cpu_has_no_tensorfloat(tmp_path):
    assert inprocess.flowtrain(tmp_path, "train", *TINY, "hydra.run.dir=run") == 0
    with pytest.raises(WorkerError, match="precision=tf32: this CPU has no TensorFloat-32 arithmetic; use precision=f"):
        inprocess.flowtrain(tmp_path, "train", *TINY, "precision=tf32")


@pytest.mark.parametrize("name", ["float32", "tf32", "bfloat16"])
def test_precision_sets_both_switches_in_training_and_neither_elsewhere(name, monkeypatch, tmp_path):
    """Also without git, which slim containers lack."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(precision, "supports", lambda *_: True)
    seen = {"steps": set(), "moments": set(), "likelihoods": set()}

    def watched(function, place):
        def watch(*args, **kwargs):
            seen[place].add(switches())
            return function(*args, **kwargs)

        return watch

    monkeypatch.setattr(TrainingPass, "backpropagate", watched(TrainingPass.backpropagate, "steps"))
    monkeypatch.setattr(evaluate, "log_likelihoods", watched(evaluate.log_likelihoods, "likelihoods"))
    monkeypatch.setattr(setup, "interruptible_batches", watched(setup.interruptible_batches, "moments"))
    words = ("model=realnvp", *TINY, f"precision={name}", "hydra.run.dir=run")
    assert inprocess.flowtrain(tmp_path, "train", *words) == 0
    on = name == "tf32"
    assert seen == {"steps": {(on, on)}, "moments": {(False, False)}, "likelihoods": {(False, False)}}
    record = json.loads((tmp_path / "run/environment.json").read_text())
    assert record["precision"] == name and record["tf32"] == {"matmul": on, "convolution": on} and record["git"] is None

    torch.backends.cudnn.allow_tf32 = True
    assert inprocess.flowtrain(tmp_path, "eval", "ckpt=run", "hydra.run.dir=eval") == 0
    record = json.loads((tmp_path / "eval/environment.json").read_text())
    assert record["precision"] == "float32" and record["tf32"] == {"matmul": False, "convolution": False}
    assert seen["likelihoods"] == {(False, False)}


# ---- which process takes which device


def test_a_process_takes_its_own_gpu_or_the_only_one_it_is_shown(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    gpus(8)
    assert distributed.device() == torch.device("cuda", 3)
    gpus(1)  # srun --gpus-per-task=1
    assert distributed.device() == torch.device("cuda", 0)
    gpus(2)
    with pytest.raises(UsageError, match="more processes than the 2 GPUs"):
        distributed.device()


def test_tasks_of_slurm_have_their_ranks(monkeypatch):
    found = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "0")  # to be restored
        monkeypatch.delenv(key)
    for key, value in {**found, "SLURM_STEP_NODELIST": "node[07-09]"}.items():
        monkeypatch.setenv(key, value)
    distributed._adopt_slurm()
    assert (distributed.rank(), distributed.world(), distributed.local_rank()) == (5, 8, 1)


def test_two_processes_on_one_gpu_are_told_so(gpus, monkeypatch):
    """NCCL would refuse them with the words of a lost process."""
    gpus(1)
    store = dist.HashStore()
    distributed._refuse_shared_gpus(store, GPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="processes 0 and 1 share a GPU: start at most one process for each GPU"):
        distributed._refuse_shared_gpus(store, GPU)
    torch.cuda.get_device_properties(GPU).uuid = "GPU-1"  # what the second task of SLURM sees as its only one
    distributed._refuse_shared_gpus(store, GPU)


@pytest.mark.parametrize("fails", [False, True])
def test_joining_binds_nccl_to_the_gpu_of_this_rank(gpus, monkeypatch, tmp_path, fails):
    gpus(2)
    current, joined = [], {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda where: current.append((threading.get_ident(), where)))
    monkeypatch.setattr(distributed, "_refuse_shared_gpus", lambda *_: None)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "to be restored")
    monkeypatch.delenv("TORCH_NCCL_DUMP_ON_TIMEOUT")
    for key, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "FLOWTRAIN_STORE": f"{tmp_path}/s"}.items():
        monkeypatch.setenv(key, value)

    def join(backend, **kwargs):
        joined.update(kwargs, backend=backend, dump=os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"])
        if fails:
            raise dist.DistBackendError("NCCL error in: NCCLUtils.cpp:1\nLast error:\nno route to node07")

    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(PeerFailure, match="^rank 1: NCCL cannot .*: no route to node07$") if fails else nullcontext():
        distributed.init()
    assert joined["backend"] == "cpu:gloo,cuda:nccl" and joined["device_id"] == torch.device("cuda", 1)
    assert joined["dump"] == "0" and {where for _, where in current} == {torch.device("cuda", 1)}
    assert len({thread for thread, _ in current}) == 2  # each thread has a device of its own


def test_more_processes_than_gpus_are_possible_on_the_cpu(gpus):
    gpus(1)
    with pytest.raises(UsageError, match=r"devices=2: there is 1 GPU; CUDA_VISIBLE_DEVICES= in front .* on the CPU$"):
        distributed.processes(2)
    gpus(0)
    with pytest.raises(UsageError, match=r"devices=9999: there (is|are) \d+ CPU cores?$"):
        distributed.processes(9999)


class Launched(Exception):
    """The number of processes that a command would run in."""


@pytest.fixture
def count_processes(monkeypatch, tmp_path):
    """``count_processes(*words)``: of ``flowtrain words``, which then does nothing."""

    def alone(**_):
        raise Launched(1)

    def launch(_job, count, *_):
        raise Launched(count)

    monkeypatch.setattr(jobs.worker, "execute", alone)
    monkeypatch.setattr(jobs.launcher, "launch", launch)

    def count(*words) -> int:
        with pytest.raises(WorkerError) as error:
            inprocess.flowtrain(tmp_path, *words)
        return int(re.match(r"Launched: (\d+)", str(error.value))[1])

    return count


def test_commands_that_work_in_one_process_start_one(gpus, count_processes, run):
    gpus(4)
    for words in (["check", "model=nice"], ["bench"], ["sample", f"ckpt={run}"]):
        assert count_processes(*words) == 1
    assert count_processes("train", *TINY) == count_processes("eval", f"ckpt={run}") == 4
    assert count_processes("sample", f"ckpt={run}", "devices=3") == 3
    assert {name for name, command in COMMANDS.items() if command.uses_every_gpu} == {
        "train",
        "rerun",
        "eval",
        "compare",
        "score",
    }


@pytest.mark.parametrize("count", [3, 5, 6, 7])
def test_any_number_of_gpus_can_share_a_batch(gpus, count_processes, count):
    gpus(count)
    assert count_processes("train") == count_processes("train", "smoke=true") == count
    assert choose_batch_size("auto", 1000, TABLE, count, 1) % count == 0
    nearest = {3: (63, 2), 5: (65, 4), 6: (66, 4), 7: (63, 4)}[count]
    with pytest.raises(UsageError, match="batch_size={} is, or take devices={}$".format(*nearest)):
        check_batch_size(64, count, 1)


def test_a_smoke_run_shares_its_few_examples_among_any_number(monkeypatch, tmp_path):
    seen = []
    config = configuration("model=nice", *TINY, "trainer.accumulate=3")
    assert config.batch_size == 8
    (tmp_path / "run").mkdir()
    train.main(config, str(tmp_path / "run"), look=lambda run: seen.append(run.config.batch_size))
    assert seen == [9]
    assert inprocess.flowtrain(tmp_path, "train", "resume=run", "max_steps=4") == 0  # with as many
    with pytest.raises(WorkerError, match="cannot resume: batch_size was 9 and is now 6"):
        inprocess.flowtrain(tmp_path, "train", "resume=run", "max_steps=5", "batch_size=6")


# ---- optimizers


@pytest.mark.parametrize("key", ["foreach", "capturable", "differentiable"])
def test_an_optimizer_keeps_the_kind_that_was_asked_for(key):
    built = {}
    for words in ([], [f"+optimizer.{key}=true"]):
        optimizer = build_optimizer(configuration(*words), torch.nn.Linear(2, 2), 100, TABLE)
        built[len(words)] = optimizer.defaults
    assert built[0]["fused"] and not built[1]["fused"] and built[1][key]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["+optimizer.foreach=true"], None),
        (["optimizer=sgd", "+optimizer.foreach=true"], None),
        (["optimizer=adamax"], None),
        (["+optimizer.fused=false"], None),
        (["+optimizer.fused=true", "+optimizer.foreach=true"], "`fused` and `foreach` cannot be `True` together"),
        (["+optimizer.capturable=true"], "optimizer.capturable=true: it cannot take a step: .*supported devices"),
        (["+optimizer.differentiable=true"], "optimizer.differentiable=true: it cannot take a step: .*in-place"),
        (["optimizer._target_=torch.optim.LBFGS"], "optimizer: it cannot take a step: .*closure"),
    ],
)
def test_an_optimizer_that_can_take_no_step_is_refused(words, says):
    words = [*words, "trainer.decay=none"]
    if "LBFGS" in words[0]:
        words += ["~optimizer.betas", "~optimizer.eps", "~optimizer.weight_decay", "optimizer.lr=1"]
    with pytest.raises(UsageError, match=says) if says else nullcontext():
        check_optimizer(configuration(*words), TABLE, CPU)


# ---- processes that are lost


@pytest.mark.parametrize(
    ("codes", "errors", "says"),
    [
        (
            (0, -6),
            {},
            "rank 1: aborted, as NCCL does where a peer failed: it has ended, or did not answer for dist",
        ),
        ((-6, -9), {}, "a worker was killed by SIGKILL: out of memory? (process 1 of 2)"),
        ((-6, 1), {1: "own"}, "rank 1 failed"),
        ((-6, 1), {1: "other"}, "rank 1 failed"),
    ],
)
def test_an_abort_by_nccl_is_a_lost_process(gpus, codes, errors, says, tmp_path):
    for rank, kind in errors.items():
        error = {"error": f"rank {rank} failed", "exit_code": 1, "kind": kind, "signum": None}
        (tmp_path / f"{rank}.json").write_text(json.dumps(error))
    group = [SimpleNamespace(returncode=code) for code in codes]
    gpus(2)
    with pytest.raises(WorkerError, match=re.escape(says)):
        launcher._collect_summary(group, 0, [], tmp_path)
    with pytest.raises(WorkerError, match=re.escape("a worker was killed by SIGABRT (process 0 of 1)")):
        launcher._collect_summary([SimpleNamespace(returncode=-6)], 0, [], tmp_path / "alone")
    gpus(0)  # where it is an error like any other
    if not errors and codes[0] == 0:
        with pytest.raises(WorkerError, match=re.escape("a worker was killed by SIGABRT (process 1 of 2)")):
            launcher._collect_summary(group, 0, [], tmp_path)


# ---- memory


TRAIN = ("train", "model=glow", *TINY)
FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.00 GiB of which some is free."


@pytest.mark.parametrize(
    ("where", "words", "says"),
    [
        # it is full already
        ("flowtrain.training.setup.check_optimizer", TRAIN, "the weights and the optimizer .* a smaller model"),
        ("flowtrain.training.optimizer.build_optimizer", TRAIN, "the weights and the optimizer"),
        ("flowtrain.training.setup.average_of", TRAIN, "the weights and the optimizer .* a smaller model"),
        ("flowtrain.training.start.Loader", TRAIN, "the data-dependent start"),
        (
            "flowtrain.flow.Flow.initialize",
            TRAIN,
            "the data-dependent start, on 8 examples in one proc.*init_batch",
        ),
        (
            "flowtrain.engine.determinism.cost",
            (*TRAIN, "deterministic=true"),
            "a training step on 8 examples a device .*batch_size, a larger trainer.accumulate, more devices.* memory=c",
        ),
        (
            "flowtrain.engine.training_pass.TrainingPass.backpropagate",
            (*TRAIN, "memory=checkpoint"),
            "a training step on 8 examples a device .* memory=reversible",
        ),
        (
            "flowtrain.engine.evaluate.log_likelihoods",
            (*TRAIN, "trainer.ema=0.9"),
            "a validation, beside what training keeps .*trainer.ema=null",
        ),
        ("flowtrain.engine.evaluate.log_likelihoods", ("eval",), "the likelihoods of the test split"),
        ("flowtrain.commands.draws._latents", ("sample", "n=5"), "5 samples, a batch at a time .* a smaller n would"),
        ("flowtrain.commands.scoring.log_likelihoods", ("score",), "3 likelihoods at once .* a smaller batch=N would"),
        ("flowtrain.commands.check.audit", ("check",), "the audit in float64 .* examples=N or jacobian=N"),
        ("flowtrain.flow.Flow.encode", ("reconstruct", "n=2"), "latents and data"),
        ("flowtrain.runtime.checkpoint.load_weights", ("eval",), "the flow's weights"),
    ],
)
def test_each_lack_of_memory_has_a_line_with_the_key_that_helps(where, words, says, run, tmp_path, monkeypatch):
    if words[0] == "score":
        np.save(tmp_path / "x.npy", np.zeros((3, 1, 8, 8), np.uint8))
        words = (*words, f"input={tmp_path}/x.npy")
    words = words if words[0] == "train" else (*words, f"ckpt={run}")

    def full(*_, **__):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(where, full)
    with pytest.raises(WorkerError, match=rf"^out of memory on cpu: {says}") as error:
        inprocess.flowtrain(tmp_path, *words)
    assert "Tried to allocate" not in str(error.value) and error.value.exit_code == 1


def test_score_names_the_batch_that_did_not_fit(run, tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((600, 1, 8, 8), np.uint8))

    def limited(flow, index, *rest):
        if len(index) > 256:  # what is measured first
            raise torch.OutOfMemoryError(FULL)
        return evaluate.log_likelihoods(flow, index, *rest)

    monkeypatch.setattr("flowtrain.commands.scoring.log_likelihoods", limited)
    with pytest.raises(WorkerError, match=r"^out of memory on cpu: [4-6]\d\d likelihoods at once"):
        inprocess.flowtrain(tmp_path, "score", f"ckpt={run}", f"input={tmp_path}/x.npy")


def test_an_image_that_does_not_fit_ends_no_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("flowtrain.commands.draws._latents", full)
    train.main(configuration("model=nice", *TINY), str(tmp_path))
    assert re.search(r"no image: out of memory on cpu: 4 samples .* a smaller trainer.sample_n would", caplog.text)


def test_torch_says_it_in_other_words_on_a_cpu():
    with pytest.raises(OutOfMemory, match=r"^out of memory on cpu: a petabyte \(peak \d+\.\d GiB\); buy more$"):
        with out_of_memory(CPU, "a petabyte", "buy more"):
            torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shape"):
        with out_of_memory(CPU, "a reshape"):
            torch.empty(3).view(2, 2)


def test_the_best_checkpoint_is_read_to_the_cpu(tmp_path, monkeypatch):
    load, places = torch.load, []

    def watched(*args, **kwargs):
        places.append(str(kwargs["map_location"]))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    config = configuration("model=nice", *TINY)
    train.main(config, str(tmp_path))
    assert places == ["cpu"]  # its optimizer too would be a copy on every GPU


# ---- profiles


def test_a_profile_counts_each_operation_of_a_gpu_once():
    def event(key, on, kernels=0.0, host=0.0, count=5, annotation=False):
        times = {"self_device_time_total": kernels, "self_cpu_time_total": host}
        return SimpleNamespace(key=key, device_type=on, count=count, is_user_annotation=annotation, **times)

    on_cpu, on_gpu = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("ProfilerStep*", on_cpu, 0.0, 9e9),
        event("ProfilerStep*", on_gpu, 9e9, annotation=True),
        event("aten::conv", on_cpu, 60e3, 1e3),
        event("cutlass_conv_kernel", on_gpu, 60e3),
        event("aten::mul", on_cpu, 20e3, 4e3, 10),
        event("elementwise_kernel", on_gpu, 20e3, count=10),
        event("cudaLaunchKernel", on_cpu, 0.0, 5e3),
        event("triton_fused", on_gpu, 20e3),
    ]
    profiler = SimpleNamespace(key_averages=lambda: events, activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    lines = [*profile._most_expensive(profiler, steps=5)]
    assert lines[0] == "   12.00 ms   60%       1 ×  aten::conv"
    assert sorted(lines[1:3]) == [
        "    4.00 ms   20%       1 ×  kernels of no operation, such as those of a CUDA graph",
        "    4.00 ms   20%       2 ×  aten::mul",
    ]
    profiler.activities = [ProfilerActivity.CPU]
    assert next(profile._most_expensive(profiler, steps=5)) == "    1.00 ms   50%       1 ×  cudaLaunchKernel"
