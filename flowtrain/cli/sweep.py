"""``results.csv`` of a sweep: a row for each job as it ends, sorted and printed at the end."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from hydra.experimental.callback import Callback

FILES = ("results.csv", "multirun.yaml")  # of a sweep, in its directory; Hydra writes the second
COLUMNS = ("job", "overrides", "status", "bits_per_dim", "log_likelihood", "steps", "seconds", "run_dir", "error")


def append(sweep_dir: str, row: dict) -> None:
    """Add a row in one write, so that jobs that run side by side do not mix theirs."""
    path = Path(sweep_dir) / "results.csv"
    with open(path, "a", newline="") as file:
        if not file.tell():
            csv.writer(file).writerow(COLUMNS)
        csv.writer(file).writerow([row.get(name, "") for name in COLUMNS])


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


class Table(Callback):
    """Hydra's callback: prints the table at the end of a sweep; the exit code is 1 if a job has failed."""

    def on_multirun_end(self, config, **kwargs) -> None:
        path = Path(config.hydra.sweep.dir) / "results.csv"
        with open(path, newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: int(row["job"]))
        with open(path.with_suffix(".tmp"), "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        path.with_suffix(".tmp").replace(path)
        out = sys.stderr if config.get("json") else sys.stdout
        if config.get("dry_run"):  # whose files are not kept
            print("\n" + _format([row | {"run_dir": ""} for row in rows]))
        else:
            print(f"{_format(rows)}\n{path}", file=out)
        if any(row["status"] == "failed" for row in rows):
            raise SystemExit(1)  # Hydra turns a callback's Exception into a warning
