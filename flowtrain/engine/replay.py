"""The record of a training step that diverged, and its replay."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flowtrain.data.batch import Batch
from flowtrain.engine.divergence import Finding, examine, first
from flowtrain.engine.objectives import Objective
from flowtrain.engine.training_pass import TrainingPass
from flowtrain.flow import Flow
from flowtrain.runtime import distributed

_NAMED = 8  # examples in a line


@dataclass(frozen=True)
class Record:
    """A global batch on which training diverged, and what a replay needs besides the weights.

    Attributes:
        x, context, weights: the :class:`Batch` of all processes.
        examples: the B examples' numbers in the train split.
        seed, parts: of the :class:`TrainingPass`.
        world: number of processes.
        found: where a number first was not finite.
    """

    step: int
    seed: int
    parts: int
    world: int
    x: Tensor
    context: Tensor | None
    examples: list[int]
    found: Finding | None
    weights: Tensor | None = None

    @classmethod
    def gather(
        cls, own: Finding | None, batch: Batch, examples: list[int], step: int, by: TrainingPass
    ) -> tuple[Record, int]:
        """The record of a step, on every process, from each one's finding, slice and examples; and the rank of a
        process that met the first finding: weights may be wrong in that one alone."""
        findings, slices, examples = zip(*distributed.all_gather_object((own, batch.to("cpu"), examples)))
        found = first(findings)
        rank = next((rank for rank, one in enumerate(findings) if found and one and one.order == found.order), 0)
        x, context, weights = (None if each[0] is None else torch.cat(each) for each in zip(*slices))
        numbers = [number for each in examples for number in each]
        return cls(step, by.seed, by.parts, len(findings), x, context, numbers, found, weights), rank

    def state_dict(self) -> dict:
        """As plain data, for a checkpoint."""
        found = self.found and {**asdict(self.found), "order": list(self.found.order), "rows": list(self.found.rows)}
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "found": found}

    @classmethod
    def from_state_dict(cls, state) -> Record:
        """Raises ValueError for what :meth:`state_dict` cannot have returned."""
        try:
            found = state["found"] and Finding(**state["found"])
            found = found and replace(found, order=tuple(found.order), rows=tuple(found.rows))
            record = cls(**{**state, "found": found})
            numbers = [record.step, record.seed, record.parts, record.world, *record.examples]
            tensors = [record.x, *(one for one in (record.context, record.weights) if one is not None)]
            sound = all(type(number) is int for number in numbers) and min(record.parts, record.world) > 0
            sound = sound and all(isinstance(one, Tensor) and one.dim() > 0 for one in tensors)
            if not sound or {len(one) for one in tensors} != {len(record.examples)} or not record.examples:
                raise ValueError("its numbers do not fit its batch")
            if len(record.examples) % record.world:
                raise ValueError("its batch cannot be shared evenly")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return record

    def replay(self, flow: Flow, objective: Objective, autocast: torch.dtype | None) -> Finding | None:
        """What first goes wrong in ``flow``, whose weights are those of the recorded step.

        The slices of several processes take turns, so that batch normalization has the moments of each alone.
        """
        device = next(flow.parameters()).device
        training_pass = TrainingPass(flow, objective, self.seed, self.parts, autocast)
        slices = Batch(self.x, self.context, self.weights).to(device).chunk(self.world)

        def step() -> Tensor:
            flow.train()
            flow.zero_grad()
            losses = [
                training_pass.backpropagate(one, self.step, rank, self.world)[0] for rank, one in enumerate(slices)
            ]
            return sum(losses) / self.world

        return examine(flow, step)

    def describe(self, found: Finding | None) -> str:
        """A finding in words, with the numbers of the examples."""
        if found is None:
            return "but all is finite when that batch is computed once more: neither data nor weights are to blame"
        numbers = [self.examples[row] for row in found.rows]
        if not numbers:
            return f"first {found.what}"
        named = ", ".join(map(str, numbers[:_NAMED]))
        more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
        return f"first {found.what}, of train example{'s' * (len(numbers) > 1)} {named}{more}"


def replay_command(path: Path, allow: list[str]) -> str:
    """The command line that replays the record in ``path``."""
    return f"flowtrain check replay='{path}'" + (f" allow=[{','.join(allow)}]" if allow else "")
