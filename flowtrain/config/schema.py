"""The keys that commands read: their types and ranges. Their defaults and help lines stand in ``conf/``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from flowtrain.errors import UsageError


def number(least=None, above=None, below=None):
    """A field whose number, or every number of whose list, keeps to these limits."""
    return field(metadata={"least": least, "above": above, "below": below})


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    clip: float | None = number(above=0)
    accumulate: int = number(least=1)
    ema: float | None = number(least=0, below=1)
    warmup_steps: int = number(least=0)
    warmup_epochs: float | None = number(least=0)
    max_epochs: float | None = number(above=0)
    log_every: int = number(least=1)
    val_every: int = number(least=1)
    val_examples: int | None = number(least=1)
    val_draws: int = number(least=1)
    sample_every: int | None = number(least=1)
    sample_n: int = number(least=1)
    save_every: int | None = number(least=1)
    save_minutes: float = number(above=0)
    patience: int | None = number(least=1)
    max_bad_steps: int = number(least=1)
    rollback: float | None = number(above=0, below=1)
    decay: str
    init_batch: int | None = number(least=1)
    workers: int = number(least=0, below=257)
    cuda_graph: Literal["auto"] | bool
    strategy: Literal["ddp", "fsdp"]
    layer_statistics: bool
    profile: bool


@dataclass(frozen=True, kw_only=True)
class DistConfig:
    timeout_s: float = number(above=0)


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    value: float
    unit: Literal["bits_per_dim", "nats"]
    space: Literal["integers", "unit", "logit", "standardized"]
    split: str
    data: str  # what the description of the split must contain to be the same data
    grey_levels: int | None  # null: real numbers
    source: str
    from_memory: bool


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Where and how long a job runs: the keys of ``conf/job.yaml``."""

    devices: Literal["auto"] | int = number(least=1)
    threads: Literal["auto"] | int = number(least=1)
    allow: list[str]
    dist: DistConfig
    job_timeout: float | None = number(above=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(JobConfig):
    """A flow, its data and how it is trained: what a checkpoint contains.

    The nodes ``model``, ``dataset``, ``target``, ``optimizer``, ``objective``, ``scheduler`` and ``logger`` are plain
    dicts, which their constructors check. So are the ``parts``: ``univariate``, ``norm``, ``preprocess`` and the other
    root nodes that models and data choose.
    """

    seed: int = number(least=0)
    batch_size: Literal["auto"] | int = number(least=1)
    max_steps: int | None = number(least=1)
    max_minutes: float | None = number(above=0)
    precision: Literal["float32", "tf32", "bfloat16"]
    compile: Literal["auto"] | bool
    memory: Literal["none", "checkpoint", "reversible"]
    resume: bool | str | None
    init: str | None
    deterministic: bool
    dry_run: bool
    smoke: bool
    report: bool
    on_bad: Literal["stop", "skip"]
    model: Any
    dataset: Any
    target: Any
    optimizer: Any
    objective: Any
    scheduler: Any
    logger: Any
    trainer: TrainerConfig
    published: PublishedConfig | None
    parts: dict[str, Any]


def check_batch_size(batch_size: int, processes: int, accumulate: int) -> None:
    """Raise UsageError for a batch that processes and their accumulated steps cannot share equally."""
    share = processes * accumulate
    if batch_size % share:
        fewer = next((count for count in range(processes - 1, 0, -1) if batch_size % (count * accumulate) == 0), None)
        raise UsageError(
            f"batch_size={batch_size}: is not a multiple of processes × trainer.accumulate = "
            f"{processes} × {accumulate}; batch_size={max(1, round(batch_size / share)) * share} is"
            + (f", or take devices={fewer}" if fewer else "")
        )
