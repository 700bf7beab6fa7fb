"""Train and evaluate the models of results/plan.yaml, and write results/<name>.json.

Arguments are names of the plan, or name=RUN or name=RUN,RUN,… for finished runs; without any, all that have no file
yet.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import yaml

RESULTS = Path("results")
PLAN = yaml.safe_load((RESULTS / "plan.yaml").read_text())


def flowtrain(*words: str) -> str:
    """Run a command, show its stdout line by line, and return it."""
    command = [sys.executable, "-m", "flowtrain", *words]
    print("$", shlex.join(["flowtrain", *words]), flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"{shlex.join(command)}: exit code {process.returncode}")
    return "".join(lines)


def measure(name: str, runs: list[str]) -> None:
    """Train the plan's model, or take its finished ``runs``, which differ in their seeds; evaluate them and write
    results/<name>.json, with the means of their figures and the record of the first."""
    entry = PLAN[name]
    words = os.path.expandvars(entry["command"]).split()
    runs = runs or [re.search(r"^run: (.*)$", flowtrain("train", *words), re.M)[1]]
    reports = [evaluate(run, words, entry.get("eval", "").split()) for run in runs]
    summaries = [json.loads((Path(run) / "summary.json").read_text()) for run in runs]
    summary = summaries[0]
    environment = json.loads((Path(runs[0]) / "environment.json").read_text())
    cores = environment["devices"] * environment["threads"]
    minutes = [f"{each['seconds'] / 60:.0f}" for each in summaries]
    result = {
        "command": f"flowtrain train {entry['command']}",
        "table": entry["table"],
        "model": entry["model"],
        **{key: mean(report[key] for report in reports) for key in FIGURES if key in reports[0]},
        "draws": reports[0]["draws"],
        **({"trace": reports[0]["trace"]} if "trace" in reports[0] else {}),
        "steps": summary["steps"],
        "parameters": summary["parameters"],
        "budget": f"{', '.join(minutes)} minute{'s' * (minutes != ['1'])}, {summary['steps']:,} steps",
        "machine": f"{cores} core{'s' * (cores > 1)}",
        "published": entry.get("published"),
    }
    if len(runs) > 1:
        key = next(key for key in FIGURES if key in result)
        result["seeds"] = {str(seed_of(run)): round(report[key], 4) for run, report in zip(runs, reports)}
        result["budget"] += f"; mean of seeds {', '.join(result['seeds'])}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def evaluate(run: str, words: list[str], options: list[str]) -> dict:
    data = [word for word in words if word.startswith(("dataset.root=", "dataset.path="))]
    report = json.loads(flowtrain("eval", f"ckpt={run}", "json=true", *data, *options))
    if "unlabelled_bits_per_dim" in report:  # the density of an image alone is that of the table's other rows
        alone = {key: report[f"unlabelled_{key}"] for key in ("bits_per_dim", "bits_per_dim_stderr")}
        alone |= {"bits_per_dim_given_label": report["bits_per_dim"], "examples": report["examples"]}
        return alone | {"draws": report["draws"]}
    return report


def seed_of(run: str) -> int:
    return yaml.safe_load((Path(run) / ".hydra/config.yaml").read_text())["seed"]


FIGURES = ("bits_per_dim", "bits_per_dim_stderr", "bits_per_dim_given_label", "log_likelihood", "log_likelihood_stderr")
FIGURES += ("examples",)

for word in sys.argv[1:] or [name for name in PLAN if not (RESULTS / f"{name}.json").exists()]:
    name, _, runs = word.partition("=")
    if name not in PLAN:
        sys.exit(f"{name} is not in results/plan.yaml, which has {', '.join(PLAN)}")
    measure(name, runs.split(",") if runs else [])
