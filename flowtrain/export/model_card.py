"""The text beside an exported flow: what it is, its figures, and the lines of Python that use it."""

from __future__ import annotations

import json
from pathlib import Path

from flowtrain.errors import FlowtrainError

LEFT_TO_YOU = """## Intended use

*To be written by whoever publishes this: what it is for, and what it is not for.*

## Licence

*To be chosen by whoever publishes this.*
"""


def figures(run: Path | None) -> list[str]:
    """Lines of a table with the newest evaluation of a run, else the validation at the end of its training."""
    found = sorted((run / "eval").glob("*/eval.json"), key=lambda file: file.stat().st_mtime) if run else []
    summary = run / "summary.json" if run else None
    if found:
        report, title = _read(found[-1]), "evaluated by `flowtrain eval`"
        names = {
            "bits_per_dim": "bits/dim",
            "bits_per_dim_iw": "bits/dim, importance-weighted",
            "log_likelihood": "nats",
            "log_likelihood_iw": "nats, importance-weighted",
        }
        rows = [
            f"| {title}, {report['split']} split, {report['examples']:,} examples | "
            + _with_error(report[name], report.get(f"{name}_stderr"))
            for name, title in names.items()
            if report.get(name) is not None
        ]
        return [f"Figures {title}, {report['weights']} weights.", "", "| figure | value |", "| --- | --- |", *rows]
    if summary and summary.is_file():
        report = _read(summary)
        rows = [
            f"| {name.removeprefix('best_')}, validation split | {report[name]:.4f} |"
            for name in ("bits_per_dim", "log_likelihood", "best_bits_per_dim", "best_log_likelihood")
            if isinstance(report.get(name), float)
        ]
        if rows:
            return [
                "Figures from the end of training; `flowtrain eval` was not run.",
                "",
                "| figure | value |",
                "| --- | --- |",
                *rows,
            ]
    return ["No figures: `flowtrain eval` has not been run on this model."]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f} |" if error is None else f"{value:.4f} ± {error:.4f} |"


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FlowtrainError(f"{path}: cannot be read ({error})") from error


def write(title: str, data: list[str], code: str, config: dict, run: Path | None, programs: list[str]) -> str:
    """The Markdown of README.md.

    Args:
        data: lines about the data.
        code: the lines of Python.
        programs: lines about the exported programs.
    """
    model = json.dumps({key: config[key] for key in ("model", *_parts(config)) if key in config}, indent=2)
    sections = [
        f"# {title}",
        "A normalizing flow: a density with exact likelihoods and samples.",
        "\n".join(["## Use", "", "```python", code, "```"]),
        "\n".join(programs),
        "\n".join(["## Data", "", *data]),
        "\n".join(["## Figures", "", *figures(run)]),
        f"## Configuration\n\n```json\n{model}\n```\n\nThe whole configuration is in the files' metadata.",
        LEFT_TO_YOU,
    ]
    return "\n\n".join(section for section in sections if section)


def _parts(config: dict) -> list[str]:
    names = ("univariate", "mixing", "norm", "base", "preprocess", "dequantize", "angles", "scales")
    return [name for name in names if config.get(name)]
