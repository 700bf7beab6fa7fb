"""The keys that the commands themselves read: types and ranges. Their defaults and meanings stand in ``conf/``."""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from flowtrain.errors import UsageError


def bounded(least=None, above=None, below=None):
    """A field whose number, or every number of whose list, keeps to the limits given."""
    return field(default=None, metadata={"least": least, "above": above, "below": below})


@dataclass
class Trainer:
    clip: float | None = bounded(above=0)
    accumulate: int = bounded(least=1)
    ema: float | None = bounded(least=0, below=1)
    warmup_steps: int = bounded(least=0)
    warmup_epochs: float | None = bounded(least=0)
    max_epochs: float | None = bounded(above=0)
    log_every: int = bounded(least=1)
    val_every: int = bounded(least=1)
    val_examples: int | None = bounded(least=1)
    val_draws: int = bounded(least=1)
    sample_every: int | None = bounded(least=1)
    sample_n: int = bounded(least=1)
    save_every: int = bounded(least=1)
    save_minutes: float = bounded(above=0)
    patience: int | None = bounded(least=1)
    max_bad_steps: int = bounded(least=1)
    rollback: float | None = bounded(above=0, below=1)
    decay: str = ""
    init_batch: int | None = bounded(least=1)
    workers: int = bounded(least=0, below=257)
    tensorboard: bool = True
    profile: bool = False


@dataclass
class Dist:
    timeout_s: float = bounded(above=0)


@dataclass
class Published:
    value: float
    unit: Literal["bits_per_dim", "nats"]
    space: Literal["integers", "unit", "logit", "standardized"]
    split: str
    data: str  # what the description of the split must say to be the same data
    levels: int | None  # null: real numbers
    source: str
    from_memory: bool


@dataclass
class Train:
    seed: int = bounded(least=0)
    devices: Literal["auto"] | int = bounded(least=1)
    batch_size: int = bounded(least=1)
    max_steps: int | None = bounded(least=1)
    max_minutes: float | None = bounded(above=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: Literal["auto"] | bool = False
    memory: Literal["none", "checkpoint", "reversible"] = "none"
    resume: bool | str | None = None
    init: str | None = None
    deterministic: bool = False
    smoke: bool = False
    on_bad: Literal["stop", "skip"] = "stop"
    allow: list[str] = field(default_factory=list)
    dist: Dist = field(default_factory=Dist)
    job_timeout: float | None = bounded(above=0)
    model: Any = None
    dataset: Any = None
    optimizer: Any = None
    objective: Any = None
    scheduler: Any = None
    logger: Any = None
    trainer: Trainer = field(default_factory=Trainer)
    published: Published | None = None


@dataclass
class Eval(Train):
    ckpt: str = ""
    run_dir: str = ""
    split: Literal["train", "val", "test"] = "test"
    draws: int = bounded(least=1)
    examples: Literal["auto"] | int | None = bounded(least=2)
    weights: Literal["auto", "ema", "raw"] = "auto"
    json: bool = False


@dataclass
class Sample(Train):
    ckpt: str = ""
    run_dir: str = ""
    n: int = bounded(least=1)
    temperature: float | list[float] = bounded(least=0)
    label: int | list[int] | None = bounded(least=0)
    context: Any = None
    plot: bool = True
    weights: Literal["auto", "ema", "raw"] = "auto"


@dataclass
class Check(Train):
    ckpt: str | None = None
    replay: str | None = None
    run_dir: str | None = None
    examples: int = bounded(least=1)
    jacobian: int = bounded(least=1)
    tolerance: float = bounded(above=0)
    weights: Literal["auto", "ema", "raw"] = "auto"
    json: bool = False


@dataclass
class Score(Train):
    ckpt: str = ""
    run_dir: str = ""
    input: str | None = None
    output: str | None = None
    draws: int = bounded(least=1)
    batch: int = bounded(least=1, below=257)
    label: int | None = bounded(least=0)
    weights: Literal["auto", "ema", "raw"] = "auto"
    json: bool = False


@dataclass
class Bench:
    seed: int = bounded(least=0)
    devices: Literal["auto"] | int = bounded(least=1)
    allow: list[str] = field(default_factory=list)
    dist: Dist = field(default_factory=Dist)
    job_timeout: float | None = bounded(above=0)
    suite: Literal["train", "sample", "spline", "memory", "data", "start", "all"] = "all"
    peers: list[Literal["nflows", "zuko", "normflows", "freia"]] = field(default_factory=list)
    threads: int = bounded(least=1)
    compile: bool = True
    rounds: int = bounded(least=1)
    seconds: float = bounded(above=0)
    plot: bool = True
    json: bool = False
    smoke: bool = False


ROOTS = {"train": Train, "eval": Eval, "sample": Sample, "check": Check, "score": Score, "bench": Bench}


RESTORED = ("eval", "sample", "check", "score", "resume", "replay")  # root configurations on top of a checkpoint's


def known_keys(command: str) -> list[str]:
    return [item.name for item in fields(ROOTS[command])]


def typed_keys(schema, prefix: str = "") -> list[str]:
    """The dotted keys of a schema, those of the schemas within it too."""
    out = []
    for item in fields(schema):
        out.append(prefix + item.name)
        nested = _schema_in(item.type)
        out += typed_keys(nested, f"{prefix}{item.name}.") if nested else []
    return out


def settled(schema, values: dict, prefix: str = "", complete: bool = True) -> dict:
    """``values`` with each key of ``schema`` as its type (1 becomes 1.0 where a float is due). Raises UsageError.

    At the root, keys that ``schema`` lacks are for the caller to judge. Only where the values need not be ``complete``,
    as those of an older checkpoint, may keys be absent.
    """
    out = dict(values)
    names = [item.name for item in fields(schema)]
    for name in values if prefix else ():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            raise UsageError(f"no key '{prefix}{name}'" + (f"; did you mean '{prefix}{near[0]}'?" if near else ""))
    for name in names:
        if complete and name not in values:
            raise UsageError(f"{prefix}{name}: is missing")
    for item in fields(schema):
        if item.name not in values:
            continue
        value, key = values[item.name], prefix + item.name
        nested = _schema_in(item.type)
        if nested and isinstance(value, dict):
            out[item.name] = settled(nested, value, f"{key}.", complete)
            continue
        try:
            out[item.name] = _fitting(value, item.type, item.metadata)
        except ValueError:
            raise UsageError(f"{key}={shown(value)}: must be {_described(item.type, item.metadata)}") from None
    return out


def _schema_in(kind):
    """The dataclass that a type is or may be, or None."""
    return next((one for one in (kind, *get_args(kind)) if is_dataclass(one)), None)


def shown(value) -> str:
    """A value as a person types it: null and true, not None and True."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _fitting(value, kind, limits):
    """The value as ``kind``, or ValueError."""
    origin, options = get_origin(kind), get_args(kind)
    if kind is Any or origin is Literal and value in options:
        return value
    if origin in (Union, UnionType):
        for option in options:
            try:
                return _fitting(value, option, limits)
            except ValueError:
                continue
    if origin is list and isinstance(value, list):
        return [_fitting(item, options[0], limits) for item in value]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or isinstance(value, int | float) and not _within(value, limits):
        raise ValueError
    return value


def _within(value, limits) -> bool:
    least, above, below = limits.get("least"), limits.get("above"), limits.get("below")
    return (least is None or value >= least) and (above is None or value > above) and (below is None or value < below)


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    Any: "anything",
}


def _described(kind, limits) -> str:
    """What ``kind`` is in a person's words: "a whole number of at least 1, or null"."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(options)
    if origin in (Union, UnionType):
        return ", or ".join(_described(option, limits) for option in options)
    if origin is list:
        return f"a list of these: {_described(options[0], limits)}"
    if is_dataclass(kind):
        return "keys and values, such as {" + fields(kind)[0].name + ": …}"
    spoken = {"least": "of at least", "above": "above", "below": "below"}
    bounds = [f"{spoken[name]} {limit:g}" for name, limit in limits.items() if limit is not None]
    return _WORDS[kind] + (" " + " and ".join(bounds) if bounds and kind in (int, float) else "")
