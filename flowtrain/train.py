"""``flowtrain train``: from a configuration to a trained flow, its checkpoints and its records."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from flowtrain.bijections.autoregressive import cost_of_likelihood
from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.bijections.ode import continuous_layers
from flowtrain.commands.data import has_bits
from flowtrain.commands.evaluation import judge
from flowtrain.commands.previews import View
from flowtrain.config.build import build, build_flow, with_hint
from flowtrain.config.compose import conf_dir, plain
from flowtrain.data import Loader
from flowtrain.engine import determinism
from flowtrain.engine.compiling import Compiled, compile_flow, explained, pays
from flowtrain.engine.ema import EMA
from flowtrain.engine.gradient import Way
from flowtrain.engine.measure import measure_of
from flowtrain.engine.precision import autocast_of
from flowtrain.engine.reporter import Reporter, Silence
from flowtrain.engine.trainer import Settings, Trainer
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed, environment, files, global_batch, status
from flowtrain.runtime.checkpoint import load_weights
from flowtrain.runtime.environment import device_name
from flowtrain.runtime.interrupts import heeded

log = logging.getLogger("flowtrain")

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # update all parameters at once, on a GPU and a CPU


def main(cfg, run_dir: str) -> dict:
    """Train what ``cfg`` says into ``run_dir``; returns the summary, on every process."""
    with status.held(run_dir) if distributed.is_main() else nullcontext():
        if distributed.is_main():
            for folder in ("", "checkpoints", "samples"):
                files.sweep(Path(run_dir) / folder)
        return _train(cfg, run_dir)


def _train(cfg, run_dir: str) -> dict:
    data = build(cfg.dataset, allow=cfg.allow, on_bad=cfg.on_bad)  # opens none, and names its own keys
    flow = build_flow(cfg, "meta")  # refuses what cannot be before any data are opened
    _optimizer(cfg, flow)
    _keep(cfg, flow)
    schedule = build(cfg.scheduler, allow=cfg.allow)
    device = distributed.device()
    if cfg.get("deterministic"):  # absent in older checkpoints
        determinism.insist()
    autocast = autocast_of(cfg.precision, device)
    train, val = data.split("train"), data.split("val")
    loader = Loader(
        train,
        cfg.batch_size,
        cfg.seed,
        data.augment,
        device,
        distributed.rank(),
        distributed.world(),
        cfg.trainer.workers,
    )
    if cfg.batch_size % (distributed.world() * cfg.trainer.accumulate):
        raise UsageError(
            f"batch_size={cfg.batch_size} is not a multiple of devices × trainer.accumulate "
            f"({distributed.world()} × {cfg.trainer.accumulate})"
        )
    settings = _settings(cfg, loader.steps_per_epoch, autocast)
    flow = build_flow(cfg, device)
    state = checkpoint.read(cfg.resume) if cfg.resume else None
    if state is None:
        _start(flow, cfg, train, device)
    if cfg.get("deterministic"):
        _tell_cost(flow, loader, cfg, autocast)
    trainer = _trainer(cfg, flow, loader, val, schedule, settings, run_dir, device)
    if state is not None:
        trainer.load_state(state)
    reporter = Silence()
    if distributed.is_main():
        _introduce(cfg, flow, train, val, settings, device, run_dir, trainer.step)
        environment.record(run_dir, device)
        lines = state and state.get("lines")  # absent in older checkpoints
        reporter = Reporter(run_dir, trainer.step, settings.max_steps, cfg.trainer.tensorboard, lines)
    try:
        with explained(), determinism.explained():
            trainer.fit(reporter)
        with trainer.eagerly():
            summary = _conclude(cfg, flow, trainer, val, run_dir)
        key = trainer.measure.key
        reporter.hyperparameters(_flat(plain(cfg)), {key: summary[key]})
    except torch.OutOfMemoryError as error:
        raise FlowtrainError(
            f"out of memory on {device_name(device)} with {cfg.batch_size // distributed.world()} examples a device "
            f"(peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB): a smaller batch_size, a larger "
            "trainer.accumulate, more devices, memory=checkpoint or precision=bfloat16 would need less"
        ) from error
    except FloatingPointError as error:
        raise FlowtrainError(str(error)) from error
    except files.Unwritable as error:
        kept = any(trainer.directory.glob("*.pt"))
        how = "the same command with resume=true goes on from the last checkpoint" if kept else "nothing was saved yet"
        raise files.Unwritable(f"{error}; {how}") from error
    finally:
        reporter.close()
    return summary


def _start(flow: Flow, cfg, train, device) -> None:
    """Weights from ``init``, or a data-dependent start from the first global batch, the same on every process.

    The first process sees the whole batch and hands the others its weights, and its buffers: DistributedDataParallel
    would keep those apart.
    """
    if cfg.init:
        log.info("weights from %s (%s)", cfg.init, load_weights(flow, checkpoint.read(cfg.init)))
    elif distributed.is_main():
        _fit(flow, train.columns)
        size = min(cfg.trainer.init_batch or cfg.batch_size, len(train))
        torch.manual_seed(cfg.seed)
        flow.initialize(*next(Loader(train, size, cfg.seed, None, device).batches()))
    distributed.broadcast(flow.state_dict().values())


def _tell_cost(flow: Flow, loader: Loader, cfg, autocast: torch.dtype | None) -> None:
    way = Way(measure_of(cfg.dataset.levels), cfg.seed, cfg.trainer.accumulate, autocast)
    batch, place = next(loader.batches()), (0, distributed.rank(), distributed.world())
    with determinism.explained():
        ratio = determinism.cost(flow, lambda copy: way.backpropagate(copy, copy, *batch, *place))
    log.info("deterministic=true: a gradient takes %.2f times as long", ratio)


def _fit(flow: Flow, columns) -> None:
    """Set the links that keep what the train split says of a table: its units, and which columns hold integers."""
    for module in flow.modules():
        if hasattr(module, "fit"):
            try:
                module.fit(columns)
            except ValueError as error:
                raise UsageError(f"preprocess: {type(module).__name__} {error}") from error


def _trainer(cfg, flow: Flow, loader: Loader, val, schedule, settings: Settings, run_dir: str, device) -> Trainer:
    wrapped = flow
    if distributed.world() > 1:
        wrapped = _parallel(flow, device, cfg.trainer.accumulate)
    ema = EMA(flow, cfg.trainer.ema) if cfg.trainer.ema else None
    compiled = _compile(flow, cfg, settings, device)
    _keep(cfg, flow)
    view = View(val.to(device), cfg) if distributed.is_main() else None

    def validate(judged: Flow):
        if global_batch.has_moments(judged):
            _remember_moments(judged, loader, cfg.trainer.val_examples)
        return judge(judged, val, cfg, cfg.trainer.val_examples, cfg.trainer.val_draws)

    columns = loader.split.columns
    return Trainer(
        flow,
        wrapped,
        loader,
        _optimizer(cfg, flow),
        schedule,
        settings,
        ema,
        validate,
        view,
        run_dir,
        measure_of(cfg.dataset.levels),
        plain(cfg),
        columns.record() if columns else None,
        compiled,
    )


def _parallel(flow: Flow, device: torch.device, accumulate: int) -> DistributedDataParallel:
    """Buffers are equal on all processes from the start and change alike: none are sent while training.

    Every backward takes the same way through the layers, but for an ODE's and for accumulated ones, of which only the
    last sends: torch fails an assertion where a graph said to be static meets ``no_sync``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases have another name for it, older ones only this
        return DistributedDataParallel(
            flow,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=accumulate == 1 and not continuous_layers(flow),
        )


def _compile(flow: Flow, cfg, settings: Settings, device: torch.device) -> Compiled | None:
    """Compile what the flow trains by, where that is asked for; or where it pays, as long as it can be done."""
    worth = cfg.memory != "reversible" and pays(device, settings.max_steps, settings.max_minutes)
    if cfg.compile is False or cfg.compile == "auto" and not worth:
        return None
    try:
        return compile_flow(flow)
    except UsageError as error:
        if cfg.compile == "auto":
            log.info("compile=auto: trains without: %s", error)
            return None
        raise


def _keep(cfg, flow: Flow) -> None:
    """Have the flow keep of its work in training what ``memory`` says; to be called after compilation."""
    if cfg.memory == "reversible" and cfg.compile is True:
        raise UsageError("compile=true: what memory=reversible runs backwards is not compiled; use memory=checkpoint")
    try:
        flow.set_backpropagation(MEMORY_MODES[cfg.memory]())
    except ValueError as error:
        raise UsageError(str(error)) from error


def _remember_moments(flow: Flow, loader: Loader, rows: int | None) -> None:
    """Batch normalization evaluates with the moments of about ``rows`` training rows (None: all) under the present
    weights."""
    batches = loader.batches()
    steps = math.ceil(rows / loader.batch_size) if rows else loader.steps_per_epoch
    torch.manual_seed(loader.seed)
    with torch.no_grad(), global_batch.reestimate(flow):
        for x, context in heeded(islice(batches, min(loader.steps_per_epoch, steps))):
            with global_batch.rows(distributed.rank() * len(x), loader.batch_size):
                flow(x, context)


def _conclude(cfg, flow: Flow, trainer: Trainer, val, run_dir: str) -> dict:
    """Judge the best weights on all validation examples and write summary.json: the mark of a finished run."""
    best = trainer.directory / "best.pt"
    distributed.barrier()  # the first process has written it
    load_weights(flow, checkpoint.read(best, map_location=next(flow.parameters()).device))
    result = judge(flow, val, cfg, draws=cfg.trainer.val_draws)
    bits = {"bits_per_dim": result.bits_per_dim, "bits_per_dim_stderr": result.bits_per_dim_stderr}
    bad = {part: _unreadable(split) for part, split in (("train", trainer.loader.split), ("validation", val))}
    summary = {
        **(bits if has_bits(cfg, trainer.loader.split.columns) else {}),
        "log_likelihood": result.log_likelihood,
        "log_likelihood_stderr": result.log_likelihood_stderr,
        "steps": trainer.step,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "seconds": round(trainer.seconds, 3),
        "skipped_steps": trainer.skipped,
        "rollbacks": trainer.rollbacks,
        "unreadable": sum(bad.values()),
        "checkpoint": str(best),
        "run_dir": str(run_dir),
    }
    if distributed.is_main():
        files.write_json(Path(run_dir) / "summary.json", summary)
        best = trainer.measure.judged(result)[2]
        log.info("finished after %d steps, %.0f s: best validation %s", trainer.step, trainer.seconds, best)
        for part, number in bad.items():
            if number:
                log.warning("on_bad=skip: %d unreadable images of the %s split were done without", number, part)
        if images := sorted((Path(run_dir) / "samples").glob("*.png")):
            log.info("samples: %s", images[-1])
        places = "".join(f" dataset.{key}='{cfg.dataset[key]}'" for key in ("root", "path") if _is_ours(cfg, key))
        log.info("next: flowtrain eval ckpt='%s'%s", run_dir, places)
    return summary


def _unreadable(split) -> int:
    """How many examples of a split some process could not read."""
    return len({number for numbers in distributed.all_gather_object([*split.bad]) for number in numbers})


def _is_ours(cfg, key: str) -> bool:
    """Whether a place of the data came from the command line, and so must be given again: no checkpoint tells it."""
    return cfg.dataset[key] not in (None, os.environ.get("FLOWTRAIN_DATA", "data"))


def _settings(cfg, steps_per_epoch: int, autocast: torch.dtype | None) -> Settings:
    trainer = cfg.trainer
    limits = [cfg.max_steps, trainer.max_epochs and math.ceil(trainer.max_epochs * steps_per_epoch)]
    max_steps = min((limit for limit in limits if limit), default=None)
    if max_steps is None and cfg.max_minutes is None:
        raise UsageError("no end: give max_steps, max_minutes or trainer.max_epochs")
    warmup = trainer.warmup_steps
    if trainer.warmup_epochs:
        warmup = math.ceil(trainer.warmup_epochs * steps_per_epoch)
        log.info("trainer.warmup_epochs=%g is %d steps", trainer.warmup_epochs, warmup)
    return Settings(
        seed=cfg.seed,
        max_steps=max_steps,
        max_minutes=cfg.max_minutes,
        accumulate=trainer.accumulate,
        clip=trainer.clip,
        warmup_steps=warmup,
        log_every=trainer.log_every,
        val_every=trainer.val_every,
        sample_every=trainer.sample_every,
        save_every=trainer.save_every,
        save_minutes=trainer.save_minutes,
        patience=trainer.patience,
        max_bad_steps=trainer.max_bad_steps,
        autocast=autocast,
        profile=trainer.get("profile", False),
        rollback=trainer.get("rollback"),  # absent in older checkpoints
    )


def _optimizer(cfg, flow: Flow) -> torch.optim.Optimizer:
    """The configured optimizer; weight decay reaches the parameters whose names match ``trainer.decay``."""
    try:
        decays = re.compile(cfg.trainer.decay)
    except re.error as error:
        raise UsageError(f"trainer.decay={cfg.trainer.decay}: no regular expression ({error})") from error
    named = list(flow.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays.search(name)]},
        {"params": [p for name, p in named if not decays.search(name)], "weight_decay": 0.0},
    ]
    make = build(cfg.optimizer, allow=cfg.allow)
    if make.func in FUSED and not any(parameter.is_meta for _, parameter in named):
        make = partial(make.func, **{"fused": True, **make.keywords})
    try:
        return make([group for group in groups if group["params"]])
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer: {with_hint(str(error), cfg.optimizer)}") from error


def _introduce(cfg, flow: Flow, train, val, settings: Settings, device, run_dir: str, step: int) -> None:
    """The first lines of a run."""
    world = distributed.world()
    count = sum(parameter.numel() for parameter in flow.parameters())
    parts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in [*flow.bijection.named_children(), ("base", flow.base)]
    }
    spread = ", ".join(f"{name} {n:,}" for name, n in parts.items() if n)
    log.info("run: %s", run_dir)
    log.info("device: %s × %d, precision %s", device_name(device), world, cfg.precision)
    log.info("data: %s; %d train, %d validation examples", train.description, len(train), len(val))
    levels = cfg.dataset.levels
    shape = "×".join(map(str, flow.shape))
    if levels:
        log.info(
            "shape %s, D = %d, %d levels: a uniform code has %.4f bits/dim",
            shape,
            flow.dimensions,
            levels,
            math.log2(levels),
        )
    else:
        log.info("shape %s, D = %d, real numbers: likelihoods in nats", shape, flow.dimensions)
    if flow.bijection.context_shape:
        log.info("context: %s, shape %s", cfg.dataset.context, "×".join(map(str, flow.bijection.context_shape)))
    log.info("model: %s parameters (%s)", f"{count:,}", spread)
    preset = f"{cfg.model.name}_{cfg.dataset.name}"
    if cfg.published is None and (conf_dir() / "experiment" / f"{preset}.yaml").exists():
        log.info("paper size: experiment=%s", preset)
    if cost := cost_of_likelihood(flow.bijection):
        log.info("%s", cost)
    if cfg.memory != "none" and not flow.backpropagation.chains(flow.bijection):
        log.warning("memory=%s: no two networks of this flow follow each other, so that all is kept", cfg.memory)
    log.info(
        "batch: %d, %d a device in %d part(s); until %s",
        cfg.batch_size,
        cfg.batch_size // world,
        cfg.trainer.accumulate,
        " or ".join(
            text
            for text in (
                settings.max_steps and f"step {settings.max_steps}",
                settings.max_minutes and f"{settings.max_minutes:g} minutes",
            )
            if text
        ),
    )
    if step:
        log.info("resumed at step %d", step)
    if cfg.trainer.tensorboard:
        log.info("watch: tensorboard --logdir '%s'", Path(run_dir).parent)


def _flat(config: dict, prefix: str = "") -> dict:
    """Nested knobs as dotted names; what TensorBoard's HParams can show."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str) and not key.startswith("_"):
            flat[prefix + key] = value
    return flat
