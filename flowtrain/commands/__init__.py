"""The commands: a table, and the keys that each reads. A command's module is imported when its job starts.

A new command needs three things: a module with ``main(config, run_dir)``, a line in :data:`COMMANDS`, and
``conf/NAME.yaml`` with its keys' defaults and help lines. Keys of its own need a dataclass here.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from flowtrain.config.schema import JobConfig, TrainConfig, number


@dataclass(frozen=True, kw_only=True)
class RerunConfig(TrainConfig):
    run: str


@dataclass(frozen=True, kw_only=True)
class EvalConfig(TrainConfig):
    ckpt: str
    split: Literal["train", "val", "test"]
    draws: int = number(least=1)
    examples: Literal["auto"] | int | None = number(least=2)
    tolerance: float = number(above=0)
    probes: int = number(least=2)
    unlabelled: bool
    weights: Literal["auto", "ema", "raw"]
    json: bool


@dataclass(frozen=True, kw_only=True)
class SampleConfig(TrainConfig):
    ckpt: str
    n: int = number(least=1)
    temperature: float | list[float] = number(least=0)
    label: int | str | list[int | str] | None = number(least=0)
    context: Any
    guidance: float = number(least=0)
    decoding: Literal["steps", "jacobi"]
    denoise: bool | None
    mcmc: bool
    output: str | None
    plot: bool
    weights: Literal["auto", "ema", "raw"] | bool


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(TrainConfig):
    ckpt: str
    n: int = number(least=1)
    steps: int = number(least=0)
    split: Literal["train", "val", "test"]
    examples: list[int] | None = number(least=0)
    path: Literal["auto", "spherical", "linear"]
    plot: bool
    weights: Literal["auto", "ema", "raw"]


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(TrainConfig):
    ckpt: str
    n: int = number(least=1)
    split: Literal["train", "val", "test"]
    examples: list[int] | None = number(least=0)
    keep: float | list[float] | None = number(least=0)
    temperature: float = number(least=0)
    tolerance: float = number(above=0)
    plot: bool
    weights: Literal["auto", "ema", "raw"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig(JobConfig):
    runs: list[str]
    split: Literal["train", "val", "test"]
    baseline: Literal["best", "first"]
    examples: int | None = number(least=2)
    draws: int | None = number(least=1)
    seed: int | None = number(least=0)
    weights: Literal["auto", "ema", "raw"]


@dataclass(frozen=True, kw_only=True)
class CheckConfig(TrainConfig):
    ckpt: str | None
    replay: str | None
    examples: int = number(least=1)
    jacobian: int = number(least=1)
    tolerance: float = number(above=0)
    calibration: bool
    simulations: int = number(least=2)
    draws: int = number(least=1)
    reference: str | None
    weights: Literal["auto", "ema", "raw"]
    json: bool


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(TrainConfig):
    ckpt: str
    input: str | None
    output: str | None
    pvalue: bool
    typicality: bool
    calibration: str | None
    level: float = number(above=0, below=1)
    by_column: bool
    outside: bool
    draws: int = number(least=1)
    batch: Literal["auto"] | int = number(least=1)
    label: int | str | None = number(least=0)
    weights: Literal["auto", "ema", "raw"]
    json: bool


@dataclass(frozen=True, kw_only=True)
class ExportConfig(TrainConfig):
    ckpt: str
    to: Literal["onnx", "torch_export", "safetensors"]
    what: (
        list[Literal["log_prob", "sample", "encode", "score"]] | Literal["log_prob", "sample", "encode", "score"] | None
    )
    solver: Literal["rk4", "heun3", "midpoint", "euler"] | None
    solver_steps: int = number(least=1)
    output: str | None
    weights: Literal["auto", "ema", "raw"]


@dataclass(frozen=True, kw_only=True)
class ReportConfig(TrainConfig):
    ckpt: str
    examples: int = number(least=2)
    n: int = number(least=1)
    temperatures: list[float] = number(least=0)
    seconds: float | None = number(above=0)
    weights: Literal["auto", "ema", "raw"]


@dataclass(frozen=True, kw_only=True)
class ImportConfig(TrainConfig):
    from_: Literal["nflows", "zuko", "normflows"] | None
    path: str | None
    output: str | None


@dataclass(frozen=True, kw_only=True)
class BenchConfig(JobConfig):
    suite: Literal[
        "train",
        "sample",
        "decode",
        "spline",
        "memory",
        "serve",
        "data",
        "epoch",
        "processes",
        "start",
        "commands",
        "all",
    ]
    peers: list[Literal["nflows", "zuko", "normflows", "freia"]]
    threads: int = number(least=1)
    compile: bool
    rounds: int = number(least=1)
    seconds: float = number(above=0)
    seed: int = number(least=0)
    plot: bool
    json: bool
    smoke: bool


@dataclass(frozen=True)
class Command:
    """Attributes:
    module: where its ``main(config, run_dir)`` is.
    summary: one line for ``flowtrain --help``.
    config: the class of the configuration that ``main`` receives.
    root: the file in ``conf/`` that it composes on where no checkpoint is opened; None: it always opens one.
    on_checkpoint: each key whose value is the path of a checkpoint, and the file in ``conf/`` that is composed on top
        of the configuration in that checkpoint.
    words: the key of words without "=", which are paths: of a checkpoint each where it is a key of ``on_checkpoint``,
        else of a list; None: the command takes no such words.
    uses_every_gpu: whether ``devices=auto`` starts a process for each GPU; else it starts one.
    """

    module: str
    summary: str
    config: type[JobConfig]
    root: str | None = None
    on_checkpoint: dict[str, str] = field(default_factory=dict)
    words: str | None = None
    uses_every_gpu: bool = False

    @property
    def trains(self) -> bool:
        return self.config is TrainConfig or self.repeats

    @property
    def repeats(self) -> bool:
        return self.config is RerunConfig

    def opens_checkpoint(self, root: str) -> bool:
        """Whether the root configuration of that name is composed on top of a checkpoint's."""
        return root in self.on_checkpoint.values()


COMMANDS = {
    "train": Command(
        "flowtrain.train",
        "fit a flow to data",
        TrainConfig,
        root="train",
        on_checkpoint={"resume": "train_resume"},
        uses_every_gpu=True,
    ),
    "rerun": Command(
        "flowtrain.rerun",
        "repeat a run from its directory",
        RerunConfig,
        on_checkpoint={"run": "rerun"},
        words="run",
        uses_every_gpu=True,
    ),
    "eval": Command(
        "flowtrain.commands.eval", "bits/dim of a run", EvalConfig, on_checkpoint={"ckpt": "eval"}, uses_every_gpu=True
    ),
    "sample": Command("flowtrain.commands.sample", "samples of a run", SampleConfig, on_checkpoint={"ckpt": "sample"}),
    "interpolate": Command(
        "flowtrain.commands.interpolate",
        "paths between real examples in latent space",
        InterpolateConfig,
        on_checkpoint={"ckpt": "interpolate"},
    ),
    "reconstruct": Command(
        "flowtrain.commands.reconstruct",
        "real examples, encoded and decoded again",
        ReconstructConfig,
        on_checkpoint={"ckpt": "reconstruct"},
    ),
    "compare": Command(
        "flowtrain.commands.compare",
        "runs side by side, on the same examples",
        CompareConfig,
        root="compare",
        words="runs",
        uses_every_gpu=True,
    ),
    "check": Command(
        "flowtrain.commands.check",
        "audit of a run's flow, or of a new one",
        CheckConfig,
        root="check_model",
        on_checkpoint={"ckpt": "check", "replay": "check_replay"},
    ),
    "score": Command(
        "flowtrain.commands.score",
        "a likelihood for each row or image",
        ScoreConfig,
        on_checkpoint={"ckpt": "score"},
        uses_every_gpu=True,
    ),
    "export": Command(
        "flowtrain.commands.export",
        "a run's flow as ONNX, torch.export or safetensors",
        ExportConfig,
        on_checkpoint={"ckpt": "export"},
    ),
    "import": Command(
        "flowtrain.commands.importing", "a flow of nflows, zuko or normflows as a run", ImportConfig, root="import"
    ),
    "report": Command(
        "flowtrain.commands.report", "a page that shows a run", ReportConfig, on_checkpoint={"ckpt": "report"}
    ),
    "bench": Command("flowtrain.commands.bench", "time and memory beside other libraries", BenchConfig, root="bench"),
}
CHECKPOINT_KEYS = {key for command in COMMANDS.values() for key in command.on_checkpoint}
