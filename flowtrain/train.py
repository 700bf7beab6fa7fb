"""``flowtrain train``: from a configuration to a trained flow, its checkpoints and its records."""

from __future__ import annotations

import logging
import math
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from flowtrain.bijections.autoregressive import sequential_layers
from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.bijections.columns import fit_to_columns
from flowtrain.commands.evaluation import evaluate_split
from flowtrain.commands.previews import Preview
from flowtrain.config import places, runs
from flowtrain.config.build import build, build_dataset, build_flow, build_objective, model_name
from flowtrain.config.compose import conf_dir
from flowtrain.config.conversion import to_dict
from flowtrain.config.schema import TrainConfig, check_batch_size
from flowtrain.data import Loader, Split
from flowtrain.data.spec import DataSpec, has_bits
from flowtrain.engine import determinism
from flowtrain.engine.auto import choose_batch_size, choose_learning_rate
from flowtrain.engine.budget import Budget
from flowtrain.engine.compiling import Compilation, compile_errors, compile_flow, pays
from flowtrain.engine.ema import EMA
from flowtrain.engine.loggers import ImageFiles, JsonLines, Logger, Loggers, RunRecord, progress
from flowtrain.engine.objectives import Objective, Score
from flowtrain.engine.precision import autocast_dtype
from flowtrain.engine.previews import Previews
from flowtrain.engine.saving import Checkpoints
from flowtrain.engine.schedules import WarmUp
from flowtrain.engine.threads import Threads, halvings
from flowtrain.engine.trainer import Trainer
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.engine.validation import Validation
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed, environment, files, global_batch, status
from flowtrain.runtime.checkpoint import load_weights
from flowtrain.runtime.environment import device_name
from flowtrain.runtime.interrupts import interruptible_batches

log = logging.getLogger("flowtrain")

FIT_EXAMPLES, FIT_NUMBERS = 2**17, 2**26  # most examples that layers are fitted to, and numbers in them
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # update all parameters at once, on a GPU and a CPU


def main(config: TrainConfig, run_dir: str) -> dict:
    """Train what ``config`` says into ``run_dir``; returns the summary, on every process."""
    with status.lock(run_dir) if distributed.is_main() else nullcontext():
        if distributed.is_main():
            for folder in ("", "checkpoints", "samples"):
                files.remove_temporary(Path(run_dir) / folder)
        return _train(config, run_dir)


def _train(config: TrainConfig, run_dir: str) -> dict:
    data = build_dataset(config)
    spec = data.spec
    if (found := data.find()) is not None:  # a checkpoint then describes its data without them
        config = replace(config, dataset=config.dataset | {"found": found})
    flow = build_flow(config, spec, "meta")  # any usage error comes before data are opened
    _optimizer(config, flow, 0, spec)
    _set_memory(config, flow)
    objective, loggers = _objective(config, spec), _loggers(config)
    schedule = build(config.scheduler, "scheduler", allow=config.allow)
    device = distributed.device()
    if config.deterministic:
        determinism.enable()
    autocast = autocast_dtype(config.precision, device)
    if config.resume and distributed.is_main():
        places.announce(runs.run_of(Path(config.resume)), data)
    train, val = data.split("train"), data.split("val")
    state = checkpoint.read(config.resume) if config.resume else None
    stored = _stored_config(config, state)
    config = replace(config, batch_size=_batch_size(config, state, len(train), spec))
    place = device, distributed.rank(), distributed.world()
    loader = Loader(train, config.batch_size, config.seed, data.augment, *place, config.trainer.workers)
    budget = _budget(config, loader.steps_per_epoch)
    flow = build_flow(config, spec, device)
    if state is None:
        _start(flow, config, train, device)
    if config.deterministic:
        _log_cost_of_determinism(flow, objective, loader, config, autocast)
    ema = EMA(flow, config.trainer.ema) if config.trainer.ema else None
    compilation = _compile(flow, config, budget, device)
    _set_memory(config, flow)

    def evaluate(flow: Flow):
        if global_batch.has_moments(flow):
            _reestimate_moments(flow, loader, config.trainer.val_examples)
        return evaluate_split(flow, val, config, config.trainer.val_examples, config.trainer.val_draws)

    trainer = Trainer(
        flow,
        objective,
        loader,
        _optimizer(config, flow, len(train), spec),
        config,
        budget=budget,
        schedule=WarmUp(schedule, _warmup_steps(config, loader.steps_per_epoch)),
        validation=Validation(evaluate, objective, config.trainer.patience),
        previews=Previews(Preview(val.to(device), spec, config) if distributed.is_main() else None),
        checkpoints=Checkpoints(run_dir, stored, train.columns.to_record() if train.columns else None),
        loggers=loggers,
        ema=ema,
        autocast=autocast,
        compilation=compilation,
        threads=_threads(config, device, compilation),
    )
    if state is not None:
        trainer.load_state_dict(state)
    if distributed.is_main():
        _log_introduction(config, spec, trainer, val, device, run_dir)
        environment.record(run_dir, device)
        places.record(run_dir, data)
    settings = _flatten({key: value for key, value in to_dict(config).items() if key != "logger"})
    try:
        with compile_errors(), determinism.determinism_errors(), _one_line_errors(config, trainer, device):
            loggers.open(
                RunRecord(
                    Path(run_dir),
                    trainer.step,
                    loggers.records,
                    budget,
                    objective.key,
                    objective.unit,
                    settings=settings,
                    examples=trainer.examples,
                )
            )
            trainer.fit()
            with trainer.pause_compilation():
                summary, score = _conclude(config, spec, trainer, val, run_dir)
            if distributed.is_main():
                environment.record(run_dir, device)  # once more: threads are chosen by now
            loggers.hyperparameters(settings, {objective.key: score.figure})
    finally:
        loggers.close()
    return summary


@contextmanager
def _one_line_errors(config: TrainConfig, trainer: Trainer, device: torch.device):
    """Raise FlowtrainError, with what may help, for the errors that end a run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FlowtrainError(
            f"out of memory on {device_name(device)} with {config.batch_size // distributed.world()} examples a device "
            f"(peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB): a smaller batch_size, a larger "
            "trainer.accumulate, more devices, memory=checkpoint or precision=bfloat16 would need less"
        ) from error
    except FloatingPointError as error:
        raise FlowtrainError(str(error)) from error
    except files.WriteError as error:
        saved = any(trainer.checkpoints.directory.glob("*.pt"))
        how = "the same command with resume=true goes on from the last checkpoint" if saved else "nothing was saved yet"
        raise files.WriteError(f"{error}; {how}") from error


def _stored_config(config: TrainConfig, state: dict | None) -> dict:
    """What checkpoints keep of ``config``. The places of the data stay as they were typed when the run began:
    ``resume=true`` finds it by them."""
    values = to_dict(config)
    if state is not None:
        typed = state["config"]["dataset"]
        values["dataset"] |= {key: typed[key] for key in places.KEYS if key in typed}
    return values


def _batch_size(config: TrainConfig, state: dict | None, rows: int, spec: DataSpec) -> int:
    """The batch size given, that of the run to resume, or the one that suits the data. Raises UsageError."""
    given, loader = config.batch_size, (state or {}).get("loader")
    if given == "auto" and isinstance(loader, dict):
        given = loader.get("batch_size", given)
    parts = distributed.world(), config.trainer.accumulate
    size = choose_batch_size(given, rows, spec, *parts)
    check_batch_size(size, *parts)
    return size


def _objective(config: TrainConfig, spec: DataSpec) -> Objective:
    objective = build_objective(config, spec)
    if not isinstance(objective, Objective):
        raise UsageError(f"objective: {type(objective).__name__} is no objective")
    return objective


def _loggers(config: TrainConfig) -> Loggers:
    """What every run records and the chosen loggers, without those that are null, on the first process; none on the
    others."""
    chosen = build(config.logger, "logger", allow=config.allow)
    chosen = {name: logger for name, logger in chosen.items() if logger is not None}
    for name, logger in chosen.items():
        if not isinstance(logger, Logger):
            raise UsageError(f"logger.{name}: {type(logger).__name__} is no logger")
    return Loggers([JsonLines(), ImageFiles(), progress(), *chosen.values()] if distributed.is_main() else ())


def _start(flow: Flow, config: TrainConfig, train, device) -> None:
    """Weights from ``init``, or a data-dependent start from the first global batch, the same on every process.

    The first process sees the whole batch and sends the others its weights and buffers.
    """
    if config.init:
        log.info("weights from %s (%s)", config.init, load_weights(flow, checkpoint.read(config.init)))
    elif distributed.is_main():
        _fit_to_data(flow, train, config.seed)
        size = min(config.trainer.init_batch or config.batch_size, len(train))
        torch.manual_seed(config.seed)
        first = next(Loader(train, size, config.seed, None, device).batches())
        flow.initialize(first.x, first.context)
    distributed.broadcast(flow.state_dict().values())


def _log_cost_of_determinism(
    flow: Flow, objective: Objective, loader: Loader, config: TrainConfig, autocast: torch.dtype | None
) -> None:
    batch, place = next(loader.batches()), (0, distributed.rank(), distributed.world())

    def step(copy: Flow) -> None:
        TrainingPass(copy, objective, config.seed, config.trainer.accumulate, autocast).backpropagate(batch, *place)

    with determinism.determinism_errors():
        ratio = determinism.cost(flow, step)
    log.info("deterministic=true: a gradient takes %.2f times as long", ratio)


def _fit_to_data(flow: Flow, train: Split, seed: int) -> None:
    """Fit the layers that depend on the train split: on a table's columns, on evenly spaced examples."""
    if not any(hasattr(module, "fit") for module in flow.modules()):
        return
    torch.manual_seed(seed)
    count = max(1, min(len(train), FIT_EXAMPLES, FIT_NUMBERS // flow.dimensions))
    rows, _ = train.take(torch.arange(count) * len(train) // count)
    try:
        fit_to_columns(flow.bijection, train.columns, rows.float())
    except ValueError as error:
        raise UsageError(f"preprocess: {error}") from error


def _compile(flow: Flow, config: TrainConfig, budget: Budget, device: torch.device) -> Compilation | None:
    """Compile the flow's training direction where ``compile`` asks for it, or where it pays and is possible."""
    worthwhile = config.memory != "reversible" and pays(device, budget)
    if config.compile is False or config.compile == "auto" and not worthwhile:
        return None
    try:
        return compile_flow(flow)
    except UsageError as error:
        if config.compile == "auto":
            log.info("compile=auto: trains without: %s", error)
            return None
        raise


def _threads(config: TrainConfig, device: torch.device, compilation: Compilation | None) -> Threads:
    """The numbers of threads to choose from: several in a process that trains alone on the CPU, unless ``threads`` or
    ``deterministic`` says otherwise; code that is compiled has its number."""
    most = torch.get_num_threads()
    alone = device.type == "cpu" and distributed.world() == 1 and not compilation
    return Threads(halvings(most) if alone and config.threads == "auto" and not config.deterministic else [most])


def _set_memory(config: TrainConfig, flow: Flow) -> None:
    """Set which activations the flow keeps in training, as ``memory`` says; to be called after compilation."""
    if config.memory == "reversible" and config.compile is True:
        raise UsageError("compile=true: what memory=reversible runs backwards is not compiled; use memory=checkpoint")
    try:
        flow.set_backpropagation(MEMORY_MODES[config.memory]())
    except ValueError as error:
        raise UsageError(str(error)) from error


def _reestimate_moments(flow: Flow, loader: Loader, rows: int | None) -> None:
    """Set the moments that batch normalization evaluates with to those of about ``rows`` training rows (None: all)
    under the present weights."""
    batches = loader.batches()
    steps = math.ceil(rows / loader.batch_size) if rows else loader.steps_per_epoch
    torch.manual_seed(loader.seed)
    with torch.no_grad(), global_batch.reestimate(flow):
        for x, context, _ in interruptible_batches(islice(batches, min(loader.steps_per_epoch, steps))):
            with global_batch.rows(distributed.rank() * len(x), loader.batch_size):
                flow(x, context)


def _conclude(config: TrainConfig, spec: DataSpec, trainer: Trainer, val, run_dir: str) -> tuple[dict, Score]:
    """Evaluate the best weights on all validation examples and write summary.json, the mark of a finished run."""
    flow, best = trainer.flow, trainer.checkpoints.best
    distributed.barrier()  # the first process has written it
    if not best.is_file():
        raise FlowtrainError(f"{best}: is missing, since no validation had a finite likelihood; a lower rate may help")
    load_weights(flow, checkpoint.read(best, map_location=next(flow.parameters()).device))
    result = evaluate_split(flow, val, config, draws=config.trainer.val_draws)
    score = trainer.objective.score(result)
    bits = {"bits_per_dim": result.bits_per_dim, "bits_per_dim_stderr": result.bits_per_dim_stderr}
    bad = {part: _unreadable(split) for part, split in (("train", trainer.loader.split), ("validation", val))}
    summary = {
        **(bits if has_bits(spec, trainer.loader.split.columns) else {}),
        "log_likelihood": result.log_likelihood,
        "log_likelihood_stderr": result.log_likelihood_stderr,
        "steps": trainer.step,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "seconds": round(trainer.seconds, 3),
        "threads": torch.get_num_threads(),
        "skipped_steps": trainer.recovery.skipped,
        "rollbacks": trainer.recovery.rollbacks,
        "unreadable": sum(bad.values()),
        "checkpoint": str(best),
        "run_dir": str(run_dir),
    }
    if distributed.is_main():
        files.write_json(Path(run_dir) / "summary.json", summary)
        log.info("finished after %d steps, %.0f s: best validation %s", trainer.step, trainer.seconds, score.text)
        for part, number in bad.items():
            if number:
                log.warning("on_bad=skip: %d unreadable images of the %s split were left out", number, part)
        if images := sorted((Path(run_dir) / "samples").glob("*.png")):
            log.info("samples: %s", images[-1])
        log.info("next: flowtrain eval ckpt='%s'", run_dir)
    return summary, score


def _unreadable(split) -> int:
    """The number of examples of a split that some process could not read."""
    return len({number for numbers in distributed.all_gather_object([*split.bad]) for number in numbers})


def _budget(config: TrainConfig, steps_per_epoch: int) -> Budget:
    epochs = config.trainer.max_epochs
    limits = [limit for limit in (config.max_steps, epochs and math.ceil(epochs * steps_per_epoch)) if limit]
    if not limits and config.max_minutes is None:
        raise UsageError("no end: give max_steps, max_minutes or trainer.max_epochs")
    return Budget(min(limits, default=None), config.max_minutes)


def _warmup_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    if not config.trainer.warmup_epochs:
        return config.trainer.warmup_steps
    steps = math.ceil(config.trainer.warmup_epochs * steps_per_epoch)
    log.info("trainer.warmup_epochs=%g is %d steps", config.trainer.warmup_epochs, steps)
    return steps


def _optimizer(config: TrainConfig, flow: Flow, rows: int, spec: DataSpec) -> torch.optim.Optimizer:
    """The configured optimizer for a train split of ``rows`` examples; weight decay reaches the parameters whose names
    match ``trainer.decay``."""
    try:
        decays = re.compile(config.trainer.decay)
    except re.error as error:
        raise UsageError(f"trainer.decay={config.trainer.decay}: no regular expression ({error})") from error
    named = list(flow.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays.search(name)]},
        {"params": [p for name, p in named if not decays.search(name)], "weight_decay": 0.0},
    ]
    node = config.optimizer
    if "lr" in node:
        node = node | {"lr": choose_learning_rate(node["lr"], rows, spec)}
    make = build(node, "optimizer", allow=config.allow)
    if make.func in FUSED and not any(parameter.is_meta for _, parameter in named):
        make = partial(make.func, **{"fused": True, **make.keywords})
    try:
        return make([group for group in groups if group["params"]])
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer: {error}") from error


def _log_introduction(config: TrainConfig, spec: DataSpec, trainer: Trainer, val, device, run_dir: str) -> None:
    """Log the first lines of a run."""
    world, flow, train = distributed.world(), trainer.flow, trainer.loader.split
    count = sum(parameter.numel() for parameter in flow.parameters())
    parts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in [*flow.bijection.named_children(), ("base", flow.base)]
    }
    spread = ", ".join(f"{name} {n:,}" for name, n in parts.items() if n)
    log.info("run: %s", run_dir)
    log.info("device: %s × %d, precision %s", device_name(device), world, config.precision)
    log.info("data: %s; %d train, %d validation examples", train.description, len(train), len(val))
    for line in train.columns.describe() if spec.columns else ():
        log.info("columns, %s", line)
    levels = spec.grey_levels
    shape = "×".join(map(str, flow.shape))
    if levels:
        log.info(
            "shape %s, D = %d, %d grey levels: a uniform code has %.4f bits/dim",
            shape,
            flow.dimensions,
            levels,
            math.log2(levels),
        )
    else:
        bound = ", lower bounds of those of the values that are not missing" if spec.has_gaps else ""
        log.info("shape %s, D = %d, real numbers: likelihoods in nats%s", shape, flow.dimensions, bound)
    if spec.context:
        log.info("context: %s, shape %s", config.dataset["context"], "×".join(map(str, spec.context_shape)))
    log.info("model: %s parameters (%s)", f"{count:,}", spread)
    if spec.columns and all(column.kind == "angle" for column in spec.columns):
        log.info("every column is an angle: circular splines are the whole flow, and model= has no part in it")
    preset = f"{model_name(config)}_{spec.name}"
    if config.published is None and (conf_dir() / "experiment" / f"{preset}.yaml").exists():
        log.info("paper size: experiment=%s", preset)
    if layers := sequential_layers(flow.bijection):
        log.info(
            "likelihood: %d sequential steps in each of %d layer(s); sampling takes one pass; model=maf: the reverse",
            max(layer.shape[0] for layer in layers),
            len(layers),
        )
    if config.memory != "none" and not flow.backpropagation.chains(flow.bijection):
        log.warning("memory=%s: no two networks of this flow follow each other, so that all is kept", config.memory)
    share, parts = config.batch_size // world, config.trainer.accumulate
    rate = trainer.weights.highest_rates[0]
    line = "batch: %d, %d a device in %d part(s); learning rate %g; until %s"
    log.info(line, config.batch_size, share, parts, rate, trainer.budget)
    if trainer.step:
        log.info("resumed at step %d", trainer.step)
    if config.logger.get("tensorboard"):
        log.info("watch: tensorboard --logdir '%s'", Path(run_dir).parent)


def _flatten(config: dict, prefix: str = "") -> dict:
    """The settings by dotted names: numbers, texts, true and false; and the names of the classes that are chosen."""
    flat = {}
    for key, value in config.items():
        if key == "_target_":
            flat[prefix.removesuffix(".")] = value.rpartition(".")[2]
        elif isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str) and not key.startswith("_"):
            flat[prefix + key] = value
    return flat
