"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowtrain.engine.compiling import Compiled
from flowtrain.engine.divergence import Record, examine, first
from flowtrain.engine.ema import EMA
from flowtrain.engine.evaluate import Evaluation
from flowtrain.engine.gradient import Way
from flowtrain.engine.measure import Measure
from flowtrain.engine.profile import profiled
from flowtrain.engine.reporter import Reporter, Silence
from flowtrain.errors import FlowtrainError, Interrupted
from flowtrain.flow import Flow
from flowtrain.runtime import checkpoint, distributed, status
from flowtrain.runtime.interrupts import awaited, heed, impatiently, remembered
from flowtrain.runtime.signals import SIGNALS

log = logging.getLogger("flowtrain")

MOST_ROLLBACKS = 3  # in a run


@dataclass(frozen=True)
class Settings:
    """How to train; conf/trainer/default.yaml says what each means."""

    seed: int
    max_steps: int | None
    max_minutes: float | None
    accumulate: int
    clip: float | None
    warmup_steps: int
    log_every: int
    val_every: int
    sample_every: int
    save_every: int
    save_minutes: float
    patience: int | None
    max_bad_steps: int
    autocast: torch.dtype | None
    profile: bool = False
    rollback: float | None = None


class Trainer:
    """Fits ``flow`` to the batches of ``loader`` by maximum likelihood.

    Args:
        wrapped: what the loss runs through: ``flow`` itself, or DistributedDataParallel around it.
        loader: its ``batches(step)`` are this process's slices of the global batches from ``step`` on.
        schedule: gives the factor of each parameter group's first rate.
        judge: validates a flow; the same result on every process.
        draw: draws an image of a flow's samples, or returns None.
        measure: what is minimized and reported.
        config: what a checkpoint keeps so that the flow can be built again.
        columns: what it keeps of a table's columns, plain data, or None.
        compiled: of a flow that runs compiled, what that took; it is told after the first step.
    """

    def __init__(
        self,
        flow: Flow,
        wrapped: nn.Module,
        loader,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[float, int], float],
        settings: Settings,
        ema: EMA | None,
        judge: Callable[[Flow], Evaluation],
        draw: Callable[[Flow], Tensor | None],
        run_dir: Path,
        measure: Measure,
        config: dict,
        columns: dict | None = None,
        compiled: Compiled | None = None,
    ):
        self.flow, self.wrapped, self.loader = flow, wrapped, loader
        self.optimizer, self.schedule, self.settings, self.ema = optimizer, schedule, settings, ema
        self.judge, self.draw, self.measure = judge, draw, measure
        self.config, self.columns, self.compiled = config, columns, compiled
        self.directory = Path(run_dir) / "checkpoints"
        self.first_rates = [group["lr"] for group in optimizer.param_groups]
        self.reporter: Reporter | Silence = Silence()
        self.step, self.seconds = 0, 0.0
        self.validated = self.shown = 0  # at which steps
        self.best, self.stale = math.inf, 0  # validation: the least loss so far, and how many since
        self.skipped, self.bad_in_a_row, self.rollbacks = 0, 0, 0
        self.good: dict | None = None  # weights, their average and the optimizer, as they were when a step was good
        self.way = Way(measure, settings.seed, settings.accumulate, settings.autocast)
        self.batch: tuple[Tensor, Tensor | None] | None = None  # this process's slice of the last
        self.loss_sum, self.loss_count = 0.0, 0  # since the last report

    def fit(self, reporter: Reporter | Silence) -> None:
        """Train until the budget is spent or validation no longer improves; whatever ends it, the state is saved.

        Raises:
            Interrupted: a signal asked for it.
            FlowtrainError: too many steps in a row were not finite.
        """
        self.reporter, settings = reporter, self.settings
        began = time.monotonic() - self.seconds
        saved = logged = time.monotonic()
        recorded = settings.profile and distributed.is_main()
        profile = profiled(self.directory.parent) if recorded else nullcontext(lambda: None)
        with remembered() as asked, profile as stepped:
            try:
                self.look()  # where a signal ended that
                batches = self.loader.batches(self.step)
                while self.progress() < 1 and not self.has_stalled():
                    loss, norm = self.gradient(*awaited(batches))
                    loss, norm, signum, self.seconds = self.read(loss, norm, asked.signum, time.monotonic() - began)
                    self.update(loss, norm)
                    self.step += 1
                    if self.compiled:
                        self.compiled.after_step(self.step)
                    stepped()
                    if self.every(settings.log_every):
                        self.report(norm, elapsed=time.monotonic() - logged)
                        logged = time.monotonic()
                    if signum:
                        raise Interrupted(signum)
                    self.look()
                    if self.every(settings.save_every) or time.monotonic() - saved > 60 * settings.save_minutes:
                        self.save()
                        saved = time.monotonic()
                if not self.has_stalled():
                    self.validate()
                self.show()
            except Interrupted:
                self.save()
                raise
            self.save()
            heed()

    def gradient(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss on this process's slice of a global batch, and the norm of the reduced gradient, on its device."""
        loss = self.backward(x, context)
        parameters = list(self.flow.parameters())
        norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None], foreach=True)
        if self.settings.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm, foreach=True)
        return loss, norm

    def backward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.wrapped.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.batch = x, context
        loss, reasons = self.way.backpropagate(
            self.flow, self.wrapped, x, context, self.step, distributed.rank(), distributed.world()
        )
        if reasons and not self.skipped:
            log.warning("step %d: %s", self.step, reasons[0])
        return loss

    def read(self, loss: Tensor, norm: Tensor, signum: int, seconds: float) -> tuple[float, float, int, float]:
        """The mean loss, the gradient's norm, any process's signal and the first process's clock, the same on every
        process: all that a step decides by, in its one read from the device."""
        world = distributed.world()
        clock = seconds if distributed.rank() == 0 else 0.0
        own = torch.tensor([clock, *(float(signum == one) for one in SIGNALS)], dtype=torch.float64)
        shared = torch.stack([loss, norm]).double() / world
        figures = distributed.all_sum(torch.cat([shared, own.to(shared.device, non_blocking=True)]))
        loss, norm, clock, *counts = figures.tolist()
        return loss, norm, next((one for one, count in zip(SIGNALS, counts) if count), 0), clock

    def update(self, loss: float, norm: float) -> None:
        """Step the optimizer; a loss or gradient that is not finite never reaches it."""
        if math.isfinite(loss) and math.isfinite(norm):
            if self.settings.rollback:
                self.remember()
            for group, first in zip(self.optimizer.param_groups, self.first_rates):
                group["lr"] = first * self.rate_factor()
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.step)
            self.bad_in_a_row = 0
            self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
            return
        if not self.skipped:
            log.warning("step %d: loss %g, gradient norm %g: skipped, as will be others like it", self.step, loss, norm)
        self.skipped, self.bad_in_a_row = self.skipped + 1, self.bad_in_a_row + 1
        if self.bad_in_a_row >= self.settings.max_bad_steps:
            self.recover()

    def remember(self) -> None:
        """Keep what a rollback needs, in the host's memory: the state before a step that is known to be good, at most
        ``save_every`` steps ago."""
        if self.good is None or self.step >= self.good["step"] + self.settings.save_every:
            self.good = _copied({"step": self.step, **self.learned()})

    def recover(self) -> None:
        """After too many bad steps in a row: back to the last good state with a lower rate, if that is asked for, and
        on with the batches that follow: those that spoiled the run may do so again.

        Raises:
            FlowtrainError: it is not, or has been done too often.
        """
        how = f"{self.bad_in_a_row} steps in a row had a loss or gradient that is not finite"
        if self.settings.rollback and self.good and self.rollbacks < MOST_ROLLBACKS:
            why = self.diverged()
            self.load_learned(_copied(self.good))
            self.rollbacks, self.bad_in_a_row = self.rollbacks + 1, 0
            log.warning(
                "step %d: %s; %s; on from the weights of step %d, the rate times %g (rollback %d of at most %d)",
                self.step,
                how,
                why,
                self.good["step"],
                self.lowered(),
                self.rollbacks,
                MOST_ROLLBACKS,
            )
            return
        self.save()
        raise FlowtrainError(
            f"stopped at step {self.step}: {how}; {self.diverged()}; "
            f"the weights before them are in {self.directory / 'last.pt'}; "
            "a lower optimizer.lr, a trainer.clip or trainer.rollback may help"
        )

    def diverged(self) -> str:
        """Where the last batch first goes wrong, in words; what a replay needs is kept. On every process."""
        with self.eagerly():
            own = examine(self.flow, lambda: self.backward(*self.batch))
        parts = [None if one is None else one.cpu() for one in self.batch]
        slices = distributed.all_gather_object((own, *parts, self.loader.examples(self.step)))
        findings, x, context, examples = zip(*slices)
        found = first(findings)
        settings = self.settings
        record = Record(
            self.step,
            settings.seed,
            settings.accumulate,
            distributed.world(),
            torch.cat(x),
            None if context[0] is None else torch.cat(context),
            [one for each in examples for one in each],
            found,
        )
        path = self.directory.parent / "divergence" / f"step_{self.step}.pt"
        # weights may be wrong in one process alone
        writer = next((rank for rank, one in enumerate(findings) if found and one and one.order == found.order), 0)
        if distributed.rank() == writer:
            checkpoint.save(
                {**self.described(), "model": self.flow.state_dict(), "ema": None, "divergence": record.state()}, path
            )
        distributed.barrier()  # an error in one process ends the others
        allow = self.config.get("allow")
        words = f"flowtrain check replay='{path}'" + (f" allow=[{','.join(allow)}]" if allow else "")
        return f"{record.told(found)}; to see it again: {words}"

    def look(self) -> None:
        if self.every(self.settings.val_every):
            self.validate()
        if self.every(self.settings.sample_every):
            self.show()

    def validate(self) -> None:
        """Judge the averaged weights where there are any, and where that is not done; keep the best."""
        if self.validated == self.step:
            return
        try:
            with self.eagerly():
                result = self.judge(self.judged)
        except Interrupted:
            raise
        except FlowtrainError as error:  # no reason to lose what was learned
            log.warning("step %d: no validation: %s", self.step, error)
            self.stale, self.validated = self.stale + 1, self.step
            return
        self.validated = self.step
        loss, figure, text = self.measure.judged(result)
        gained = loss < self.best
        log.info("step %d: validation %s%s", self.step, text, ", the best so far" if gained else "")
        self.reporter.scalars(self.step, {f"val/{self.measure.key}": figure})
        self.stale = 0 if gained else self.stale + 1
        if gained:
            self.best = loss
            if distributed.is_main():
                checkpoint.save(self.state(), self.directory / "best.pt")

    def show(self) -> None:
        """What the flow makes of the same latents each time, or its density, if that is not done; the others wait."""
        if self.shown == self.step:
            return
        if distributed.is_main():
            with suppress(Interrupted):  # the others are told of it next
                self.image()
        heed()
        self.shown = self.step

    def image(self) -> None:
        try:
            with self.eagerly(), impatiently():
                image = self.draw(self.judged)
        except Interrupted:
            raise
        except (FloatingPointError, FlowtrainError) as error:
            log.warning("step %d: no image: %s", self.step, error)
            return
        if image is not None:
            self.reporter.image(self.step, "samples", image)

    def report(self, norm: float, elapsed: float) -> None:
        rate = self.settings.log_every * self.loader.batch_size / elapsed
        spent = self.progress()
        loss = self.loss_sum / self.loss_count if self.loss_count else math.nan
        figure = self.measure.reported(loss, self.flow.dimensions)
        left = self.seconds * (1 - spent) / spent
        self.reporter.progress(self.step, f"{figure:.4f} {self.measure.unit}", rate, left)
        self.reporter.scalars(
            self.step,
            {
                f"train/{self.measure.key}": figure,
                **_statistics(self.flow),
                "train/gradient_norm": norm,
                "train/lr": self.optimizer.param_groups[0]["lr"],
                "train/skipped_steps": self.skipped,
                **({"train/recompiles": self.compiled.recompiles} if self.compiled else {}),
                "time/seconds": self.seconds,
                "time/examples_per_second": rate,
            },
        )
        self.loss_sum, self.loss_count = 0.0, 0

    @property
    def judged(self) -> Flow:
        """The flow that is validated and sampled."""
        return self.ema.model if self.ema else self.flow

    def eagerly(self):
        """Within it, nothing runs compiled: only training steps do."""
        return self.compiled.eagerly() if self.compiled else nullcontext()

    def progress(self) -> float:
        """The share of the budget that is spent: of its steps or of its minutes, whichever is more."""
        steps, minutes = self.settings.max_steps, self.settings.max_minutes
        return min(1.0, max(self.step / steps if steps else 0.0, self.seconds / (60 * minutes) if minutes else 0.0))

    def rate_factor(self) -> float:
        warm = min(1.0, (self.step + 1) / self.settings.warmup_steps) if self.settings.warmup_steps else 1.0
        return warm * self.lowered() * self.schedule(self.progress(), self.step)

    def lowered(self) -> float:
        """What rollbacks have left of the rate."""
        return (self.settings.rollback or 1.0) ** self.rollbacks

    def has_stalled(self) -> bool:
        return self.settings.patience is not None and self.stale >= self.settings.patience

    def every(self, steps: int | None) -> bool:
        return bool(steps) and self.step % steps == 0

    # Everything that a run's future depends on; noise and the order of the data follow from the step.
    _PLAIN = ("step", "seconds", "best", "stale", "skipped", "bad_in_a_row", "loss_sum", "loss_count")

    def state(self) -> dict:
        return {
            **self.described(),
            **{name: getattr(self, name) for name in self._PLAIN},
            "rollbacks": self.rollbacks,
            "good": self.good,
            "order": self.loader.state_dict(),
            "validated": self.validated,
            "shown": self.shown,
            "lines": self.reporter.lines,
            **self.learned(),
        }

    def described(self) -> dict:
        """What says which flow it is."""
        return {"format": 1, "config": self.config, "columns": self.columns}

    def learned(self) -> dict:
        return {
            "model": self.flow.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict) -> None:
        """Continue from what :meth:`state` returned.

        Raises:
            FlowtrainError: the data are not those that the state was trained on.
        """
        self.loader.load_state_dict(state["order"])
        self.load_learned(state)
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.validated, self.shown = (state.get(name, self.step) for name in ("validated", "shown"))  # older: always
        self.rollbacks, self.good = state.get("rollbacks", 0), state.get("good")  # absent in older checkpoints

    def load_learned(self, state: dict) -> None:
        self.flow.load_state_dict(state["model"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"] or state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self) -> None:
        self.flow.statistics()  # what its memory knows of wrong gradients since the last report stops the run first
        if distributed.is_main():
            checkpoint.save_last(self.state(), self.directory)
            status.record_checkpoint(self.directory.parent, self.step)


def _copied(state):
    """Plain containers with copies of their tensors, in the host's memory."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state


def _statistics(flow: Flow) -> dict[str, float]:
    """What layers count while they run, such as an ODE's evaluations, summed over the layers."""
    total: dict[str, float] = {}
    for module in flow.modules():
        if hasattr(module, "statistics"):
            for name, value in module.statistics().items():
                total[name] = total.get(name, 0) + value
    return total
