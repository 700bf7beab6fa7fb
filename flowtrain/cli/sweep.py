"""``results.csv`` of a sweep: a row for each job as it ends, sorted, printed and drawn at the end."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path

import yaml

from flowtrain.runtime import files

RESULTS, RECORD = "results.csv", "sweep.json"  # in a sweep's directory
COLUMNS = ("job", "overrides", "status", "bits_per_dim", "log_likelihood", "steps", "seconds", "run_dir", "error")
FREE = ("resume", "job_timeout", "dist")  # keys that do not change what a job finds
# words that do not make another sweep: how its jobs run, and how many
OPEN_KEYS = (*FREE, "launcher", "hydra/launcher", "hydra.mode", "hydra.sweeper.n_trials", "hydra.sweeper.n_jobs")


def append(sweep_dir: str, row: dict) -> None:
    """Add a row in one write, so that jobs that run side by side do not mix theirs."""
    path, text = Path(sweep_dir) / RESULTS, StringIO(newline="")
    if path.is_file() and (before := path.read_bytes()):
        text.write("" if before.endswith(b"\n") else "\r\n")  # after a row that a kill has cut
    else:
        csv.writer(text).writerow(COLUMNS)
    csv.writer(text).writerow([row.get(name, "") for name in COLUMNS])
    with open(path, "a", newline="") as file:
        file.write(text.getvalue())


def read(folder: Path) -> list[dict]:
    """The rows of ``results.csv`` in ``folder``, the last of each job, sorted by their numbers."""
    path = folder / RESULTS
    if not path.is_file():
        return []
    with open(path, newline="", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if None not in (*row, *row.values()) and row["job"].isdigit()]
    return sorted({(row["job"], *words_of(row)): row for row in rows}.values(), key=lambda row: int(row["job"]))


def words_of(row: dict) -> list[str]:
    """The words of a job, without those that do not change its result."""
    words = row["overrides"].split(" ")
    with suppress(OSError, yaml.YAMLError):  # a failed job may have left no directory
        words = yaml.safe_load((Path(row["run_dir"]) / ".hydra" / "overrides.yaml").read_text())
    return sorted(without_free(words))


def without_free(words: list[str]) -> list[str]:
    """``words`` without those that may differ when a sweep goes on."""
    return [word for word in words if not _is_free(word.lstrip("+~").partition("=")[0])]


def _is_free(key: str) -> bool:
    return key in OPEN_KEYS or key.startswith(("hydra.sweep.", "hydra.launcher.", "dist."))


def figure(row: dict) -> float | None:
    """What a sweep minimizes: bits per dimension, else the negative log-likelihood; None where a job has neither."""
    for key, sign in (("bits_per_dim", 1.0), ("log_likelihood", -1.0)):
        if row.get(key) not in (None, ""):
            return sign * float(row[key])
    return None


def conclude(folder: Path, rows: list[dict], raw: list[str], out) -> None:
    """Sort, print and draw the results of a sweep, of which ``raw`` are the words."""
    files.write(folder / RESULTS, _csv(rows).encode())
    lines = [_format(rows), str(folder / RESULTS)]
    if (best := best_of(rows)) is not None:
        lines.append(f"best: job {best['job']}, {best['overrides']}")
        lines += [line for line in [_draw(folder, rows, raw)] if line]
    print("\n".join(lines), file=out)


def conclude_dry(rows: list[dict], out) -> None:
    """Print what a sweep of dry runs found, of which no file is kept."""
    print("\n" + _format([row | {"run_dir": ""} for row in rows]), file=out)


def best_of(rows: list[dict]) -> dict | None:
    """The finished row with the least figure; None where there are not two to compare."""
    ranked = [row for row in rows if row["status"] == "finished" and figure(row) is not None]
    return min(ranked, key=figure) if len(ranked) > 1 else None


def _draw(folder: Path, rows: list[dict], raw: list[str]) -> str | None:
    """Draw the figure against each key that differs; says where, or what is missing."""
    finished = [row for row in rows if row["status"] == "finished" and figure(row) is not None]
    words = [dict(word.lstrip("+").partition("=")[::2] for word in words_of(row)) for row in finished]
    swept = {key for one in words for key in one if len({each.get(key) for each in words}) > 1}
    if not swept:
        return None
    try:
        from flowtrain.plots.sweep import plot_sweep
    except ImportError:
        return "a picture of the sweep needs matplotlib: pip install 'flowtrain[plots]'"
    key = next(name for name in ("bits_per_dim", "log_likelihood") if finished[0][name])
    values = [float(row[key]) for row in finished]
    errors = [_stderr(Path(row["run_dir"]), key) for row in finished]
    log_keys = {word.lstrip("+").partition("=")[0] for word in raw if "tag(log" in word.replace(" ", "")}
    path = folder / "sweep.png"
    columns = {key: [one.get(key, "") for one in words] for key in sorted(swept)}
    plot_sweep(path, columns, values, errors, key, least_is_best=key == "bits_per_dim", log_keys=log_keys)
    return str(path)


def _stderr(run_dir: Path, key: str) -> float | None:
    """The standard error of a job's figure, as its summary or evaluation says."""
    for name in ("summary.json", "eval.json"):
        with suppress(OSError, ValueError):
            found = json.loads((run_dir / name).read_text()).get(f"{key}_stderr")
            return None if found is None else float(found)
    return None


def _csv(rows: list[dict]) -> str:
    text = StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _format(rows: list[dict]) -> str:
    names = [name for name in COLUMNS if any(row[name] for row in rows)]
    lines = [names] + [[_short(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _short(cell: str) -> str:
    try:
        return f"{float(cell):.6g}"
    except ValueError:
        return cell


def output(json_only: bool):
    """Where a sweep's table goes: stdout is JSON's, where a command prints that."""
    return sys.stderr if json_only else sys.stdout
