"""From a configuration to a Trainer that is ready to fit: what training and its dry run share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch

from flowtrain.bijections.backpropagation import MEMORY_MODES
from flowtrain.commands.evaluation import evaluate_split
from flowtrain.commands.previews import Preview
from flowtrain.config import places, runs
from flowtrain.config.build import build, build_dataset, build_flow, build_objective
from flowtrain.config.conversion import to_dict
from flowtrain.config.schema import TrainConfig
from flowtrain.data import Loader, Split
from flowtrain.data.dataset import Dataset
from flowtrain.data.spec import DataSpec
from flowtrain.engine import determinism
from flowtrain.engine.compile_choice import CompileChoice
from flowtrain.engine.ema import EMA
from flowtrain.engine.evaluate import Evaluation
from flowtrain.engine.loggers import ImageFiles, JsonLines, Logger, Loggers, RunRecord, progress
from flowtrain.engine.objectives import Objective
from flowtrain.engine.precision import autocast_dtype, exact_arithmetic, set_tf32
from flowtrain.engine.previews import Previews
from flowtrain.engine.saving import Checkpoints
from flowtrain.engine.schedules import WarmUp
from flowtrain.engine.threads import RepeatedThreads, Threads
from flowtrain.engine.trainer import Trainer
from flowtrain.engine.validation import Validation
from flowtrain.engine.weights import Weights
from flowtrain.errors import UsageError
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed, global_batch
from flowtrain.runtime.interrupts import interruptible_batches
from flowtrain.runtime.seeds import TURN
from flowtrain.targets.checks import check_target
from flowtrain.training.batch_size import batch_size_of
from flowtrain.training.compilation import choose_compilation, gradient_of, threads_of
from flowtrain.training.cuda_graph import check_cuda_graph, training_pass_of
from flowtrain.training.memory import memory_of_steps, memory_of_validation, memory_of_weights
from flowtrain.training.optimizer import budget_of, build_optimizer, check_optimizer, warmup_steps
from flowtrain.training.recorded import Recorded
from flowtrain.training.sharding import check_sharding, is_sharded, share_weights
from flowtrain.training.start import average_of, start
from flowtrain.training.target import STARTING_POINTS, check_flow

log = logging.getLogger("flowtrain")

Schedule = Callable[[float, int], float]  # the factor of the learning rates, of the share of the budget and the step


@dataclass(frozen=True)
class SetUp:
    """A run before its flow is built: the data are open, and all that can be refused before has been.

    Attributes:
        config: its ``batch_size`` is a number.
        stored: what checkpoints keep of the configuration.
        state: of the checkpoint that the run resumes, or None.
        before: what the run has chosen before it was resumed, or the one that it repeats; nothing in a new run.
    """

    config: TrainConfig
    run_dir: str
    data: Dataset
    train: Split
    val: Split
    device: torch.device
    objective: Objective
    schedule: Schedule
    loggers: Loggers
    stored: dict
    state: dict | None
    before: Recorded = Recorded()

    @property
    def spec(self) -> DataSpec:
        return self.data.spec

    @cached_property
    def preview(self) -> Preview | None:
        return Preview(self.val.to(self.device), self.spec, self.config) if distributed.is_main() else None

    def new_flow(self, config: TrainConfig) -> Flow:
        """A flow at the start of a run with ``config``."""
        with memory_of_weights(config, self.device):
            flow = build_flow(config, self.spec, self.device)
        self.objective.prepare(flow)
        if self.state is None:
            start(flow, config, self.train, self.device, self.objective.start_rows)
        return flow

    def loader(self, config: TrainConfig) -> Loader:
        place = self.device, distributed.rank(), distributed.world()
        return Loader(self.train, config.batch_size, config.seed, self.data.augment, *place, config.trainer.workers)

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.run_dir, self.stored, self.train.columns.to_record() if self.train.columns else None)

    def trainer(
        self,
        flow: Flow,
        config: TrainConfig,
        choice: CompileChoice | None = None,
        ema: EMA | None = None,
        weights: Callable[..., Weights] | None = None,
    ) -> Trainer:
        """A Trainer of ``flow``. Raises UsageError where ``config`` asks for what cannot be."""
        loader, choice = self.loader(config), choice or CompileChoice()
        set_memory(config, flow)  # after compilation

        def evaluate(flow: Flow, examples: int | None = config.trainer.val_examples) -> Evaluation:
            if global_batch.has_moments(flow):
                reestimate_moments(flow, loader, config.trainer.val_examples)
            with memory_of_validation(config, self.device):
                measure, draws = self.objective.measure, config.trainer.val_draws
                return evaluate_split(flow, self.val, config, examples, draws, measure=measure)

        return Trainer(
            flow,
            self.objective,
            loader,
            build_optimizer(config, flow, len(self.train), self.spec),
            config,
            budget=budget_of(config, loader.steps_per_epoch),
            schedule=WarmUp(self.schedule, warmup_steps(config, loader.steps_per_epoch)),
            validation=Validation(evaluate, self.objective, config.trainer.patience),
            previews=Previews(self.preview),
            checkpoints=self.checkpoints(),
            loggers=self.loggers,
            ema=ema,
            training_pass=training_pass_of(config, flow, self.objective, self.device),
            compile_choice=choice,
            threads=chosen_threads(config, self.device, choice.compilation is not None, self.before.turns),
            weights=weights,
        )

    def ready_trainer(self) -> Trainer:
        """The Trainer of this run, at its first step or where it resumes."""
        config = self.config
        flow = self.new_flow(config)
        if config.deterministic:
            with memory_of_steps(config, self.device):
                log_cost_of_determinism(flow, self.objective, self.loader(config), config)
        with memory_of_weights(config, self.device):
            ema = average_of(flow, config)  # a copy from before compilation
        budget = budget_of(config, len(self.train) // config.batch_size)
        weights, choice = None, None
        if is_sharded(config):
            weights = share_weights(flow, ema, self.device)
        else:
            choice = choose_compilation(self, flow, config, budget)
        with memory_of_weights(config, self.device):
            trainer = self.trainer(flow, config, choice, ema, weights)
            if self.state is not None:
                trainer.load_state_dict(self.state)
        return trainer


def set_up(config: TrainConfig, run_dir: str, before: Recorded = Recorded()) -> SetUp:
    """Refuse what can be refused before data are opened, then open them and choose the batch size."""
    data = build_dataset(config)
    spec = data.spec
    if (found := data.find()) is not None:  # a checkpoint then describes its data without them
        config = replace(config, dataset=config.dataset | {"found": found})
    device = distributed.device()
    flow, objective, schedule = prepare(config, spec, device)  # any usage error comes before data are opened
    loggers = build_loggers(config)
    if config.target is not None:
        check_flow(config, flow)
    check_cuda_graph(config, flow, device)
    if config.resume and distributed.is_main():
        places.announce(runs.run_of(Path(config.resume)), data)
    train, val = data.split("train"), data.split("val")
    if spec.target is not None:
        check_target(spec.target, train.to(device).take(torch.arange(STARTING_POINTS))[0])
    state = checkpoint.read(config.resume) if config.resume else None
    stored = stored_config(config, state)
    if state:
        before = Recorded.of(state).resumed()
    run = SetUp(config, run_dir, data, train, val, device, objective, schedule, loggers, stored, state, before)
    return replace(run, config=replace(config, batch_size=batch_size_of(run)))


def prepare(config: TrainConfig, spec: DataSpec, device: torch.device) -> tuple[Flow, Objective, Schedule]:
    """A flow without numbers, on the meta device, the objective and the learning rates' schedule of a run. What
    ``config`` asks for and cannot be is refused. Sets torch's switches.

    Raises:
        UsageError: a part cannot be built, or not for this device.
    """
    flow = build_flow(config, spec, "meta")
    build_optimizer(config, flow, 0, spec)
    set_memory(config, flow)
    objective = objective_of(config, spec)
    check_objective(config, objective, flow)
    check_sharding(config, flow)
    schedule = build(config.scheduler, "scheduler", allow=config.allow)
    autocast_dtype(config.precision, device)
    set_arithmetic(config)
    with memory_of_weights(config, device):
        check_optimizer(config, spec, device)
    return flow, objective, schedule


def set_arithmetic(config: TrainConfig) -> None:
    """Set torch's switches that decide how a run computes. Its cache of compiled code tells programs apart by them."""
    determinism.choose(config.deterministic)
    set_tf32(config.precision)


def record_of(run: SetUp, trainer: Trainer) -> RunRecord:
    """The run as its loggers know it."""
    return RunRecord(
        Path(run.run_dir),
        trainer.step,
        run.loggers.records,
        trainer.budget,
        run.objective.key,
        run.objective.unit,
        settings=_flatten({key: value for key, value in to_dict(run.config).items() if key != "logger"}),
        examples=trainer.examples,
        train_key=run.objective.train_key,
        train_unit=run.objective.train_unit,
    )


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


def stored_config(config: TrainConfig, state: dict | None) -> dict:
    """What checkpoints keep of ``config``. The places of the data stay as they were typed when the run began:
    ``resume=true`` finds it by them."""
    values = to_dict(config)
    if state is not None:
        typed = state["config"]["dataset"]
        values["dataset"] |= {key: typed[key] for key in places.KEYS if key in typed}
    return values


def objective_of(config: TrainConfig, spec: DataSpec) -> Objective:
    objective = build_objective(config, spec)
    if not isinstance(objective, Objective):
        raise UsageError(f"objective: {type(objective).__name__} is no flowtrain.engine.objectives.Objective")
    for name in ("key", "unit"):
        if not hasattr(objective, name):
            raise UsageError(f"objective: {type(objective).__name__} has no {name}")
    return objective


def check_objective(config: TrainConfig, objective: Objective, flow: Flow) -> None:
    """Raise UsageError where ``objective`` cannot train ``flow``, or not as ``config`` says."""
    try:
        objective.prepare(flow)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if objective.runs_layers:
        return
    if config.memory != "none":
        raise UsageError(f"memory={config.memory}: {type(objective).__name__} runs no chain of layers; it must be none")
    if config.compile is True:
        raise UsageError("compile=true: the networks of equations are not compiled; use auto or false")


def build_loggers(config: TrainConfig) -> Loggers:
    """What every run records and the chosen loggers, without those that are null, on the first process; none on the
    others."""
    chosen = build(config.logger, "logger", allow=config.allow)
    chosen = {name: logger for name, logger in chosen.items() if logger is not None}
    for name, logger in chosen.items():
        if not isinstance(logger, Logger):
            raise UsageError(f"logger.{name}: {type(logger).__name__} is no logger")
    return Loggers([JsonLines(), ImageFiles(), progress(), *chosen.values()] if distributed.is_main() else ())


def log_cost_of_determinism(flow: Flow, objective: Objective, loader: Loader, config: TrainConfig) -> None:
    batch = next(loader.batches())
    with determinism.determinism_errors():
        ratio = determinism.cost(flow, lambda copy: gradient_of(copy, objective, config, batch)())
    log.info("deterministic=true: a gradient takes %.2f times as long", ratio)


def chosen_threads(
    config: TrainConfig, device: torch.device, compiled: bool = False, turns: tuple[int, ...] = ()
) -> Threads:
    """The choice of the number of threads; where there are ``turns``, they are repeated. What is compiled has its
    number."""
    numbers = [torch.get_num_threads()] if compiled else threads_of(config, device)
    repeats = turns and len(numbers) > 1 and max(turns) <= numbers[0]
    return RepeatedThreads([*turns]) if repeats else Threads(numbers)


def set_memory(config: TrainConfig, flow: Flow) -> None:
    """Set which activations the flow keeps in training, as ``memory`` says; to be called after compilation."""
    if config.target is not None and config.memory != "none":
        raise UsageError(f"memory={config.memory}: a target needs the layers' inverses, whose activations are all kept")
    if config.memory == "reversible" and config.compile is True:
        raise UsageError("compile=true: what memory=reversible runs backwards is not compiled; use memory=checkpoint")
    try:
        flow.set_backpropagation(MEMORY_MODES[config.memory]())
    except ValueError as error:
        raise UsageError(str(error)) from error


def reestimate_moments(flow: Flow, loader: Loader, rows: int | None) -> None:
    """Set the moments that batch normalization evaluates with to those of about ``rows`` training rows (None: all)
    under the present weights, in exact arithmetic."""
    batches = loader.batches()
    steps = math.ceil(rows / loader.batch_size) if rows else loader.steps_per_epoch
    with TURN, torch.no_grad(), exact_arithmetic(), global_batch.reestimate(flow):
        torch.manual_seed(loader.seed)
        for x, context, _ in interruptible_batches(islice(batches, min(loader.steps_per_epoch, steps))):
            with global_batch.rows(distributed.rank() * len(x), loader.batch_size):
                flow(x, context)
