"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from flowtrain.data.batch import Batch
from flowtrain.engine.agreement import Agreed, agree
from flowtrain.engine.budget import Budget
from flowtrain.engine.compile_choice import CompileChoice
from flowtrain.engine.compiling import Compilation
from flowtrain.engine.divergence import examine
from flowtrain.engine.ema import EMA
from flowtrain.engine.flat_weights import FlatWeights
from flowtrain.engine.loggers import Loggers
from flowtrain.engine.objectives import Objective
from flowtrain.engine.peak import peak_memory
from flowtrain.engine.previews import Previews
from flowtrain.engine.profile import profile_steps
from flowtrain.engine.recovery import Recovery
from flowtrain.engine.replay import Record, replay_command
from flowtrain.engine.saving import Checkpoints, InMemory
from flowtrain.engine.state import Stateful
from flowtrain.engine.statistics import LayerStatistics, counts
from flowtrain.engine.threads import Threads
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.engine.validation import Validation
from flowtrain.engine.weights import Weights
from flowtrain.errors import FlowtrainError, Interrupted
from flowtrain.flow import Flow
from flowtrain.runtime import distributed
from flowtrain.runtime.interrupts import SignalNote, check_signals, next_batch, note_signals
from flowtrain.runtime.seeds import TURN

log = logging.getLogger("flowtrain")


class Trainer(Stateful):
    """Fits ``flow`` to the batches of ``loader`` by minimizing ``objective``.

    Args:
        loader: its ``batches(step)`` are this process's slices of the global batches from ``step`` on.
        optimizer: of all of the flow's parameters, at their highest learning rates.
        config: the run's configuration; ``seed``, ``allow`` and ``trainer`` are read.
        budget: when training ends.
        schedule: the factor of the learning rates, a function of the share of the budget that is spent and the step.
        validation, previews, checkpoints: what happens at intervals.
        loggers: where the run's records go.
        ema: the average of the weights, which is validated and previewed in place of ``flow``.
        training_pass: computes the gradients; None: one of ``objective``, in the weights' precision.
        compile_choice: whether ``flow`` runs compiled, which may change between two steps; None: it never does.
        threads: the numbers of threads to choose from; None: the present one.
        weights: makes the :class:`Weights` of the flow, its optimizer and its average; None: those of one process, or
            of several that each have all.
    """

    # with the weights, all that a run's future depends on: noise and the order of the data follow from the step
    STATE = (
        "step",
        "seconds",
        "loss_sum",
        "loss_count",
        "validation",
        "previews",
        "recovery",
        "loader",
        "loggers",
        "threads",
    )

    def __init__(
        self,
        flow: Flow,
        objective: Objective,
        loader,
        optimizer: torch.optim.Optimizer,
        config,
        *,
        budget: Budget,
        schedule: Callable[[float, int], float],
        validation: Validation,
        previews: Previews,
        checkpoints: Checkpoints | InMemory,
        loggers: Loggers,
        ema: EMA | None = None,
        training_pass: TrainingPass | None = None,
        compile_choice: CompileChoice | None = None,
        threads: Threads | None = None,
        weights: Callable[..., Weights] | None = None,
    ):
        self.flow, self.objective, self.loader, self.config = flow, objective, loader, config
        self.budget, self.schedule = budget, schedule
        self.compile_choice = compile_choice or CompileChoice()
        self.validation, self.previews = validation, previews
        self.threads = threads or Threads([torch.get_num_threads()])
        self.checkpoints, self.loggers = checkpoints, loggers
        if weights is None:
            weights = FlatWeights if FlatWeights.fit(flow, optimizer) else Weights
        self.weights: Weights = weights(flow, optimizer, ema)
        self.training_pass = training_pass or TrainingPass(flow, objective, config.seed, config.trainer.accumulate)
        if distributed.world() > 1 and not self.weights.averages_gradients:
            self.training_pass.synchronize()
        copy_every = config.trainer.save_every or config.trainer.val_every
        self.recovery = Recovery(config.trainer.max_bad_steps, config.trainer.rollback, copy_every)
        self.examples = "images" if len(flow.shape) == 3 else "rows"  # what the data consist of
        self.batch: Batch | None = None  # this process's slice of the last
        self.step, self.seconds = 0, 0.0
        self.loss_sum, self.loss_count = 0.0, 0  # since the last report
        self.logged = time.monotonic()  # when that was

    def fit(self) -> None:
        """Train until the budget is spent or validation no longer improves; whatever ends it, the state is saved.

        Raises:
            Interrupted: a signal asked for it.
            FlowtrainError: too many steps in a row were not finite.
        """
        config = self.config.trainer
        began = time.monotonic() - self.seconds
        saved, self.logged = self.seconds, time.monotonic()
        profiles = config.profile and distributed.is_main()
        profiler = profile_steps(self.checkpoints.run_dir) if profiles else nullcontext(lambda: None)
        with note_signals() as noted, self.compile_choice, profiler as profile_step:
            try:
                self.threads.start()
                self.flow.train()
                self.validate_and_preview()  # where a signal came before
                batches = self.loader.batches(self.step)
                while self.progress() < 1 and not self.validation.stalled:
                    signum = self.advance(batches, began, noted)
                    profile_step()
                    if signum:
                        raise Interrupted(signum)
                    self.validate_and_preview()
                    if self.every(config.save_every) or self.seconds - saved > 60 * config.save_minutes:
                        self.save()
                        saved = self.seconds
                if not self.validation.stalled:
                    self.validate()
                self.preview()
            except Interrupted:
                self.save()
                raise
            self.save()
            self.weights.release()
            check_signals()

    # ---- a step

    def advance(self, batches: Iterator[Batch], began: float, noted: SignalNote) -> int:
        """Train on the next of ``batches`` in a run that ``began`` then, and report where that is due; a signal that
        any process has noted, or 0."""
        batch, start = next_batch(batches), time.monotonic()
        norm, signum = self.take_step(batch, began, noted)
        took = time.monotonic() - start
        self.threads.after_step(took)
        if self.threads.chosen:
            self.compile_choice.after_step(self.step, self.seconds, took)
        if self.every(self.config.trainer.log_every):
            self.report(norm, elapsed=time.monotonic() - self.logged)
            self.logged = time.monotonic()
        return signum

    def take_step(self, batch: Batch, began: float, noted: SignalNote) -> tuple[float, int]:
        """Train on a batch, in a run that ``began`` then; the gradient's norm and a signal that any process has
        noted, or 0."""
        norm, signum = self.update(agree(*self.gradient(batch), noted.signum, time.monotonic() - began))
        self.step += 1
        if self.compilation:
            self.compilation.after_step(self.step)
        return norm, signum

    def gradient(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss on this process's slice of a global batch, and the norm of the global gradient, on the device."""
        self.batch = batch
        return self.backward(), self.weights.clip(self.config.trainer.clip)

    def backward(self) -> Tensor:
        if not self.flow.training:
            self.flow.train()
        for parameter in self.weights.parameters:
            parameter.grad = None
        self.objective.begin_step(self.progress())
        place = self.step, distributed.rank(), distributed.world()
        with TURN:
            loss, reasons = self.training_pass.backpropagate(self.batch, *place)
        if reasons and not self.recovery.skipped:
            log.warning("step %d: %s", self.step, reasons[0])
        return loss

    def update(self, agreed: Agreed) -> tuple[float, int]:
        """Step the optimizer; a loss or gradient that is not finite never reaches it. The norm and a signal.

        Where the optimizer can leave out a step by itself, it is launched before the host knows of the gradient, so
        that a GPU need not wait for the host.

        Raises:
            FlowtrainError: there were too many such steps in a row, and no rollback.
        """
        self.weights.set_rates(self.rate_factor())
        launched = self.weights.takes_condition and not self.recovery.is_copy_due(self.step)
        if launched:
            self.weights.step(agreed.finite)
        loss, norm, signum, self.seconds = agreed.read()
        if math.isfinite(loss) and math.isfinite(norm):
            self.recovery.accept(self.step, self.weights.state_dict)
            if not launched:
                self.weights.step()
            self.weights.update_average(self.step)
            self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        elif self.recovery.skip(self.step, loss, norm):
            if not self.recovery.possible:
                self.save()
                raise self.recovery.error(self.step, self.describe_divergence(), self.checkpoints.last)
            self.weights.load_state_dict(self.recovery.roll_back(self.step, self.describe_divergence()))
        return norm, signum

    def rate_factor(self) -> float:
        return self.recovery.rate * self.schedule(self.progress(), self.step)

    def describe_divergence(self) -> str:
        """Where the last batch first goes wrong, in words; saves its record for a replay. Called on every process."""
        with self.pause_compilation():
            own = examine(self.flow, self.backward)
        examples = self.loader.examples(self.step)
        record, rank = Record.gather(own, self.batch, examples, self.step, self.training_pass)
        path = self.checkpoints.save_divergence(self.weights.model_state(), record, rank)
        again = f"; to see it again: {replay_command(path, self.config.allow)}" if path else ""
        return f"{record.describe(record.found)}{again}"

    # ---- at intervals

    def validate_and_preview(self) -> None:
        if self.every(self.config.trainer.val_every):
            self.validate()
        if self.every(self.config.trainer.sample_every):
            self.preview()

    def validate(self) -> None:
        """Evaluate the averaged weights, where there are any, and save the best; once a step."""
        if self.validation.step == self.step:
            return
        with self.pause_compilation():
            score = self.validation.run(self.weights.average, self.step)
        if score:
            self.loggers.scalars(self.step, {f"val/{self.objective.key}": score.figure})
            if self.validation.improved:
                self.checkpoints.save_best(self.state_dict())

    def preview(self) -> None:
        """Draw samples or a density; once a step."""
        if self.previews.step == self.step:
            return
        with self.pause_compilation():
            image = self.previews.run(self.weights.whole(self.weights.average), self.step)
        if image is not None:
            self.loggers.image(self.step, "samples", image)

    def report(self, norm: float, elapsed: float) -> None:
        loss = self.loss_sum / self.loss_count if self.loss_count else math.nan
        values = {
            f"train/{self.objective.train_key or self.objective.key}": self.objective.figure(self.flow, loss),
            **counts(self.flow),
            "train/gradient_norm": norm,
            "train/lr": self.weights.optimizer.param_groups[0]["lr"],
            "train/skipped_steps": self.recovery.skipped,
            **({"train/recompiles": self.compilation.recompiles} if self.compilation else {}),
            "system/seconds": self.seconds,
            f"system/{self.examples}_per_second": self.config.trainer.log_every * self.loader.batch_size / elapsed,
            "system/peak_memory_mib": peak_memory(self.batch.x.device) / 2**20,
        }
        if self.config.trainer.layer_statistics:
            values |= self.layer_statistics()
        self.loggers.scalars(self.step, values)
        self.loss_sum, self.loss_count = 0.0, 0

    def layer_statistics(self) -> dict[str, float]:
        """What passes through each layer for the last batch, under the present weights. Called on every process."""
        statistics = LayerStatistics(self.flow)
        with self.pause_compilation(), statistics.watch():
            self.training_pass.repeat(self.batch, self.step - 1, distributed.rank(), distributed.world())
        return statistics.read()

    def save(self) -> None:
        self.flow.statistics()  # raises, where gradients since the last report were wrong, before weights are kept
        self.checkpoints.save_last(self.state_dict())

    @property
    def compilation(self) -> Compilation | None:
        """Of the flow, if it runs compiled by now."""
        return self.compile_choice.compilation

    def pause_compilation(self):
        """Within it nothing runs compiled: only training steps do."""
        return self.compilation.pause() if self.compilation else nullcontext()

    def progress(self) -> float:
        """The share of the budget that is spent."""
        return self.budget.spent(self.step, self.seconds)

    def every(self, steps: int | None) -> bool:
        return bool(steps) and self.step % steps == 0

    def state_dict(self) -> dict:
        return {**super().state_dict(), "compilation": self.compile_choice.state_dict(), **self.weights.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            FlowtrainError: the state lacks something, or was trained on other data.
        """
        try:
            super().load_state_dict(state)
            self.weights.load_state_dict(state)
        except KeyError as error:
            raise FlowtrainError(f"cannot resume: the checkpoint lacks {error}") from error
