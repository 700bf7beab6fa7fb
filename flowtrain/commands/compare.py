"""``flowtrain compare``: runs side by side, on the same examples."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections import Counter
from datetime import datetime
from io import StringIO
from pathlib import Path

import numpy as np

from flowtrain.commands import CompareConfig, EvalConfig
from flowtrain.commands.draws import draw_samples
from flowtrain.commands.eval import EXAMPLES, evaluate
from flowtrain.commands.restored import restore
from flowtrain.config import runs as run_directories
from flowtrain.config.recorded import differing, recorded_keys
from flowtrain.config.restore import command_config
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.plots.grid import image_grid
from flowtrain.report.compare_page import compare_page
from flowtrain.report.compare_text import terminal_text
from flowtrain.report.comparison import ComparedRun, Comparison, Evaluation, compare
from flowtrain.report.run import read_metrics
from flowtrain.runtime import checkpoint, distributed, files

PICTURES, SAMPLES = 12, 36  # runs whose samples are shown; samples that are drawn for a run without an image
TIME = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?"  # in the names of runs and sweeps
EVALUATION = {"tolerance": 1e-3, "probes": 2, "unlabelled": False, "json": False}  # as in conf/eval.yaml


def main(config: CompareConfig, run_dir: str) -> dict:
    """Print and write compare.csv and compare.html into ``run_dir``: the keys in which runs differ, their figures, and
    the difference of each from the best on the same examples. Returns the files' paths.

    Runs are paired by the examples of their evaluations of the same data with the same noise. A run without such an
    evaluation is evaluated, into its own ``eval/<time>/``, where the next comparison finds it.

    Raises:
        UsageError: fewer than two runs are named, or one is not there.
    """
    given = find_runs(config.runs)
    runs = [_read_run(path, name) for path, name in zip(given, _short_names(given))]
    _evaluate_all(runs, config)
    if not distributed.is_main():
        return {}
    found = compare(runs, differing([run.keys for run in runs]), config.baseline == "first")
    for row in found.rows[:PICTURES]:
        row.run.picture = _picture(row.run, config)
    paths = {name: Path(run_dir) / f"compare.{name}" for name in ("csv", "html")}
    files.write(paths["csv"], _csv(found).encode("utf-8", "backslashreplace"))
    files.write(paths["html"], compare_page(found, config.split).encode("utf-8", "backslashreplace"))
    print(terminal_text(found, config.split, shutil.get_terminal_size((120, 0)).columns))
    for path in paths.values():
        print(path)
    return {name: str(path) for name, path in paths.items()}


# ---- which runs ----------------------------------------------------------------------------------------------------


def find_runs(given: list[str]) -> list[Path]:
    """Run directories and checkpoint files, each once: those given, and the runs in a given folder, such as a sweep.

    Raises:
        UsageError: fewer than two, or one is not there.
    """
    found: dict[Path, None] = {}
    for text in given:
        path = Path(os.path.expanduser(text))
        if path.is_dir() and not _is_run(path):
            runs = filter(_is_run, [*path.glob("*"), *path.glob("*/*")])
            inside = sorted(set(runs) - _repeated(path), key=_natural)
            if not inside:
                raise UsageError(f"{text}: neither a run nor a folder with runs, such as outputs/sweeps/…")
            found |= dict.fromkeys(one.absolute() for one in inside)
        else:
            if not path.is_dir():
                run_directories.checkpoint_in(text, "runs")  # what is wrong with a path that is not there
            found[path.absolute()] = None
    if len(found) < 2:
        newest = [os.path.relpath(run) for run in run_directories.newest_first()[:2]]
        example = " ".join(newest) if len(newest) == 2 else "outputs/a outputs/b"
        have = "one run is" if found else "no runs are"
        raise UsageError(f"{have} named; two or more are compared, or a sweep: flowtrain compare {example}")
    return list(found)


def _is_run(path: Path) -> bool:
    return path.is_dir() and (run_directories.holds_run(path) or (path / "status.json").is_file())


def _repeated(folder: Path) -> set[Path]:
    """The runs of jobs of a sweep that ran once more: results.csv names the last run of each job."""
    try:
        with open(folder / "results.csv", newline="", errors="replace") as file:
            last = {Path(row["run_dir"] or "").name for row in csv.DictReader(file)}
    except (OSError, KeyError):
        return set()
    jobs = tuple(f"{name.partition('_')[0]}_" for name in last if name)
    return {path for path in folder.glob("*") if path.name.startswith(jobs) and path.name not in last}


def _natural(path: Path) -> tuple:
    """Jobs of a sweep by their numbers: 2_… before 10_…."""
    number = path.name.partition("_")[0]
    return (int(number), path.name) if number.isdecimal() else (-1, path.name)


def _short_names(paths: list[Path]) -> list[str]:
    """A name for each path: the last folder that is no date; for equal names, the time too; else the path."""
    names = []
    for path in paths:
        *folders, last = (path.parent.parent if path.parent.name == "checkpoints" else path).parts
        dates = [part for part in (folders[-1:] + [last]) if re.fullmatch(TIME, part)]
        name = folders[-1] if last in dates and folders else last
        names.append((f"{name}/{path.name}" if path.is_file() and name != path.name else name, dates))
    days = {date[:10] for _, dates in names for date in dates[-1:]}
    found = []
    for name, dates in names:
        if [other for other, _ in names].count(name) > 1 and dates:
            name += " " + (dates[-1][11:] if len(days) == 1 else dates[-1])
        found.append(name)
    return [str(path) if found.count(name) > 1 else name for path, name in zip(paths, found)]


# ---- reading -------------------------------------------------------------------------------------------------------


def _read_run(path: Path, name: str) -> ComparedRun:
    """What a run has; what it lacks becomes a line."""
    run = ComparedRun(name, path)
    directory = path if path.is_dir() else run_directories.run_of(path)
    run.checkpoint = _checkpoint(run)
    try:
        run.keys = recorded_keys(directory, run.checkpoint)
    except FlowtrainError as error:
        run.missing.append(f"no configuration: {error}")
    if directory is None:
        return run
    run.summary = _read_json(run, directory / "summary.json")
    status = _read_json(run, directory / "status.json")
    run.state = status.get("state") or ("finished" if run.summary else "")
    if run.state == "failed":
        run.missing.append(f"failed: {str(status.get('error')).partition('; ')[0][:200]}")
    elif not run.summary:
        run.missing.append(f"not finished ({run.state or 'no summary.json'}), step {status.get('step') or 0}")
    run.curves = read_metrics(directory / "metrics.jsonl")
    run.overrides = _overrides(directory)
    return run


def _checkpoint(run: ComparedRun) -> Path | None:
    """The checkpoint that is compared; None, and a line in ``run.missing``, where there is none."""
    if run.path.is_file():
        return run.path
    file, problems = run_directories.best_intact(run.path)
    run.missing += problems
    if file is None and not problems:
        run.missing.append("no checkpoint, so nothing to evaluate")
    return file


def _read_json(run: ComparedRun, path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        run.missing.append(f"{path.name} cannot be read: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _overrides(directory: Path) -> dict[str, str]:
    import yaml

    try:
        words = yaml.safe_load((directory / ".hydra" / "overrides.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    pairs = [str(word).lstrip("+").partition("=") for word in (words if isinstance(words, list) else [])]
    return {key: value for key, equals, value in pairs if equals and key not in ("resume", "devices", "threads")}


# ---- evaluations ---------------------------------------------------------------------------------------------------


def _evaluate_all(runs: list[ComparedRun], config: CompareConfig) -> None:
    """Give each run its newest evaluation with the noise of the others, or evaluate it."""
    have = [list(_evaluations(run, config)) for run in runs]
    seed, draws = _noise(have, config)
    for run, evaluations in zip(runs, have):
        if run.checkpoint is None:
            continue
        run.evaluation = next((one for one in evaluations if _noise_of(one) == (seed, draws)), None)
        if run.evaluation is not None:
            continue
        if distributed.is_main():
            print(f"evaluating {run.name} on {config.split}, {config.examples or 'all'} examples at most", flush=True)
        try:
            run.evaluation = _evaluate(run.checkpoint, config, seed, draws)
        except FlowtrainError as error:
            if distributed.world() > 1:  # the others wait
                raise
            run.missing.append(f"cannot be evaluated: {error}")


def _evaluations(run: ComparedRun, config: CompareConfig):
    """The usable evaluations of a run's checkpoint, the newest first."""
    file = run.checkpoint
    if file is None:
        return
    digest = checkpoint.digest(file)
    weights = config.weights
    if weights == "auto":
        weights = "raw" if run.keys.get("trainer.ema") in (None, "null") else "ema"
    folder = Path(run_directories.output_path(str(file), "eval"))
    for path in sorted(folder.glob("*/eval.json"), key=lambda one: one.stat().st_mtime_ns, reverse=True):
        try:
            report = json.loads(path.read_text())
            each = np.load(path.with_name("log_likelihoods.npy"))
            beside = path.with_name("example_weights.npy")
            one = Evaluation(report, each, np.load(beside) if beside.is_file() else None)
        except (OSError, ValueError):
            continue
        wanted = {"split": config.split, "checkpoint_sha256": digest, "weights": weights}
        wanted |= {key: value for key, value in (("draws", config.draws), ("seed", config.seed)) if value is not None}
        if _is_whole(one) and all(report[key] == value for key, value in wanted.items()):
            if _covers(one, config.examples):
                yield one


def _is_whole(one: Evaluation) -> bool:
    """Whether an evaluation has what a comparison needs; those of older versions have not."""
    if not isinstance(one.report, dict):
        return False
    numbers = [one.report.get(key) for key in ("dimensions", "seed", "draws", "examples")]
    texts = [one.report.get(key) for key in ("split", "data_sha256", "checkpoint_sha256", "weights")]
    arrays = [one.each, *([] if one.weights is None else [one.weights])]
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and all(array.ndim == 1 and len(array) == len(one.each) and array.dtype.kind == "f" for array in arrays)
    )


def _covers(one: Evaluation, examples: int | None) -> bool:
    """Whether at least so many examples were evaluated, or all (or, of an exact trace, as many as eval takes)."""
    count = len(one.each)
    least = min(examples or count, count, EXAMPLES if one.report.get("trace") == "exact" else count)
    return np.isfinite(one.each).sum() >= least or one.report["examples"] >= least


def _noise_of(one: Evaluation) -> tuple[int, int]:
    return one.report["seed"], one.report["draws"]


def _noise(have: list[list[Evaluation]], config: CompareConfig) -> tuple[int, int]:
    """The seed and the number of draws that most runs are evaluated with, else those of ``config``, else 1 and 1."""
    counts = Counter(noise for evaluations in have for noise in dict.fromkeys(map(_noise_of, evaluations)))
    if counts:
        return max(counts, key=lambda noise: (counts[noise], noise[1]))
    return 1 if config.seed is None else config.seed, config.draws or 1


def _evaluate(file: Path, config: CompareConfig, seed: int, draws: int) -> Evaluation:
    """Evaluate a checkpoint as ``flowtrain eval`` does, into the directory of its run."""
    own = {**EVALUATION, "split": config.split, "draws": draws, "weights": config.weights, "seed": seed}
    examples = config.examples if config.examples is not None else "auto"
    keys = command_config(EvalConfig, file, config, ckpt=str(file), examples=examples, **own)
    if keys.target is not None:
        raise FlowtrainError("it learned from a target, of which there are no examples; flowtrain eval has its figures")
    folder = Path(run_directories.output_path(str(file), "eval")) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(distributed.broadcast_object(run_directories.claim(str(folder)) if distributed.is_main() else None))
    try:
        evaluate(keys, str(folder))
    except FlowtrainError:
        if distributed.is_main():
            shutil.rmtree(folder)
        raise
    distributed.barrier()
    weights = folder / "example_weights.npy"
    report = json.loads((folder / "eval.json").read_text())
    each = np.load(folder / "log_likelihoods.npy")
    return Evaluation(report, each, np.load(weights) if weights.is_file() else None)


def _picture(run: ComparedRun, config: CompareConfig) -> np.ndarray | None:
    """The last image of samples that a run keeps, else one that is drawn now, (H, W, 3) uint8; None: it has none."""
    from PIL import Image

    directory = run.path if run.path.is_dir() else run_directories.run_of(run.path)
    kept = sorted((directory / "samples").glob("*.png")) if directory and run.path.is_dir() else []
    try:
        if kept:
            return np.asarray(Image.open(kept[-1]).convert("RGB"))
        file = run.checkpoint
        if file is None or run.evaluation is None:
            return None
        keys = {**EVALUATION, "split": "test", "draws": 1, "weights": config.weights, "examples": None}
        restored = restore(command_config(EvalConfig, file, config, ckpt=str(file), **keys), str(file), config.weights)
        if not restored.dataset.spec.is_image or restored.flow.context_shape:
            return None
        image = image_grid(draw_samples(restored.flow, SAMPLES, 1), restored.dataset.spec.grey_levels)
        return np.moveaxis(image.numpy(), 0, 2)
    except (OSError, FlowtrainError) as error:
        run.missing.append(f"no samples to show: {error}")
        return None


# ---- compare.csv ---------------------------------------------------------------------------------------------------


def _csv(found: Comparison) -> str:
    """A row for each run, in the order of the table."""
    head = ["run", "path", "state", *found.keys, "unit", "figure", "stderr", "examples", "validation"]
    head += ["validation_stderr", "parameters", "steps", "seconds", "reference", "difference", "difference_stderr"]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, "reading", "missing"])
    for row in found.rows:
        run, group, difference = row.run, found.group_of(row), row.difference
        unit = group.unit if group else ""
        name = "bits_per_dim" if "bits_per_dim" in run.summary else "log_likelihood"
        writer.writerow(
            [
                run.name,
                run.path,
                run.state,
                *(run.keys.get(key) for key in found.keys),
                unit,
                row.figure,
                row.stderr,
                group.examples if group else None,
                run.summary.get(name),
                run.summary.get(f"{name}_stderr"),
                *(run.summary.get(key) for key in ("parameters", "steps", "seconds")),
                row.reference,
                difference.mean if difference else (0.0 if row.is_reference else None),
                difference.stderr if difference else (0.0 if row.is_reference else None),
                difference.words if difference else ("the reference" if row.is_reference else None),
                "; ".join(run.missing),
            ]
        )
    return text.getvalue()
