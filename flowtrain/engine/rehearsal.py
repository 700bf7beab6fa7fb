"""What a training step costs here, from real steps that are forgotten afterwards."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from flowtrain.engine.peak import peak_bytes, tensors_in
from flowtrain.engine.threads import SLOW
from flowtrain.engine.trainer import Trainer
from flowtrain.runtime import distributed
from flowtrain.runtime.interrupts import SignalNote


@dataclass(frozen=True)
class Cost:
    """Attributes:
    times: seconds of each step that was measured, the first ones left out.
    bytes: of all tensors that are alive at once in a step: weights, their average, the optimizer's state, gradients,
        activations and the batch. What a kernel of a CPU allocates internally does not count.
    """

    times: tuple[float, ...]
    bytes: int

    @property
    def seconds(self) -> float:
        """Of a typical step."""
        return median(self.times)

    @property
    def fastest(self) -> float:
        """Seconds of a step that nothing else on the machine slowed down."""
        return min(self.times)


class Rehearsal:
    """Takes the next steps of a run and measures them, on every process. They change the flow, its average and the
    optimizer."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.batches = trainer, trainer.loader.batches(trainer.step)
        self.taken, self.device = 0, next(trainer.flow.parameters()).device

    def step(self) -> float:
        """Take a step, its batch included; the seconds that it took."""
        began, self.taken = time.perf_counter(), self.taken + 1
        self.trainer.take_step(next(self.batches), time.monotonic(), SignalNote())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return distributed.broadcast_object(time.perf_counter() - began)  # all processes take equally many

    def choose_threads(self) -> int:
        """Set the number of threads, of those that the run would choose from, with which steps are fastest here."""
        numbers, times = self.trainer.threads.numbers, {}
        for number in numbers if len(numbers) > 1 else ():
            torch.set_num_threads(number)
            first = self.step()  # which is slower than the others
            times[number] = min(first, *self.times(seconds=0.1, least=1 if first > 1 else 2, most=3))
            if times[number] > SLOW * min(times.values()):
                break
        torch.set_num_threads(min(times, key=times.get, default=numbers[0]))
        return torch.get_num_threads()

    def peak(self) -> int:
        """The bytes that a step needs, when the optimizer has its state: after the first."""
        if not self.taken:
            self.step()
        flow = self.trainer.flow
        flow.zero_grad()  # the gradients belong to the step
        with self.trainer.pause_compilation() if self.device.type == "cpu" else nullcontext():
            beyond = peak_bytes(self.step, self.device)
        buckets = distributed.world() > 1  # of the gradients, which are there all the time
        return kept_bytes(self.trainer) + beyond + buckets * sum(one.nbytes for one in flow.parameters())

    def times(self, seconds: float, least: int = 2, most: int = 20) -> tuple[float, ...]:
        """The durations of as many steps as take about ``seconds``, ``least`` at least and ``most`` at most."""
        times: list[float] = []
        while len(times) < least or sum(times) < seconds and len(times) < most:
            times.append(self.step())
        return tuple(times)

    def cost(self, seconds: float, least: int = 2, most: int = 20) -> Cost:
        peak = self.peak()
        return Cost(self.times(seconds, least, most), peak)


def kept_bytes(trainer: Trainer) -> int:
    """Bytes that stay from one step to the next: weights and buffers, their average, the optimizer's state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(trainer.weights.state_dict()))


def free_bytes(device: torch.device) -> float:
    """Memory that this process could still fill with tensors; infinity where the system does not say."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return math.inf
