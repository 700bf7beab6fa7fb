"""All parts, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass

from on_gpu import (
    beside_others,
    cifar10,
    families,
    glow,
    gpu_tests,
    machine,
    memory_modes,
    out_of_memory,
    processes,
    resuming,
)
from on_gpu.part import Part


@dataclass(frozen=True)
class Stage:
    """Parts that run in one go: ``at_once`` processes side by side, in ``seconds``."""

    parts: list[Part]
    seconds: float
    at_once: int


STAGES = {
    "check": Stage(
        [
            families.PART,
            glow.COMPILING,
            resuming.PART,
            processes.PART,
            memory_modes.PART,
            out_of_memory.PART,
            gpu_tests.PART,
        ],
        230,
        at_once=9,
    ),
    "measure": Stage(
        [
            machine.PART,
            glow.EAGER,
            glow.COMPILED,
            glow.GRAPH,
            glow.PEERS,
            beside_others.SPLINES,
            beside_others.SAMPLING,
            beside_others.STEPS,
            cifar10.PART,
        ],
        480,
        at_once=1,
    ),
}
PARTS = {part.name: part for stage in STAGES.values() for part in stage.parts}


def named(names: list[str], parts: list[Part]) -> list[Part]:
    """The parts of these names; all if there are none.

    Raises:
        SystemExit: there is no such part.
    """
    unknown = {*names} - {part.name for part in parts}
    if unknown:
        known = ", ".join(part.name for part in parts)
        raise SystemExit(f"no part {', '.join(sorted(unknown))}; there are {known}")
    return [part for part in parts if not names or part.name in names]
