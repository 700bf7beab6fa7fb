"""Train and evaluate the models of results/plan.yaml, and write results/<name>.json.

Arguments are names of the plan, or name=RUN for a finished run; without any, all that have no file yet.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

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


def measure(name: str, run_dir: str = "") -> None:
    """Train the plan's model, or take the finished run ``run_dir``; evaluate it and write results/<name>.json."""
    entry = PLAN[name]
    words = os.path.expandvars(entry["command"]).split()
    run_dir = run_dir or re.search(r"^run: (.*)$", flowtrain("train", *words), re.M)[1]
    data = [word for word in words if word.startswith(("dataset.root=", "dataset.path="))]
    report = json.loads(flowtrain("eval", f"ckpt={run_dir}", "json=true", *data, *entry.get("eval", "").split()))
    summary = json.loads((Path(run_dir) / "summary.json").read_text())
    environment = json.loads((Path(run_dir) / "environment.json").read_text())
    cores = environment["devices"] * environment["threads"]
    minutes = summary["seconds"] / 60
    unlabelled = {key.removeprefix("unlabelled_"): value for key, value in report.items() if "unlabelled_" in key}
    if unlabelled:  # the density of an image alone is that of the table's other rows
        report |= unlabelled | {"bits_per_dim_given_label": report["bits_per_dim"]}
    result = {
        "command": f"flowtrain train {entry['command']}",
        "table": entry["table"],
        "model": entry["model"],
        **{key: report[key] for key in FIGURES if key in report},
        "draws": report["draws"],
        **({"trace": report["trace"]} if "trace" in report else {}),
        "steps": summary["steps"],
        "parameters": summary["parameters"],
        "budget": f"{minutes:.0f} minute{'s' * (minutes >= 1.5)}, {summary['steps']:,} steps",
        "machine": f"{cores} core{'s' * (cores > 1)}",
        "published": entry.get("published"),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


FIGURES = ("bits_per_dim", "bits_per_dim_stderr", "bits_per_dim_given_label", "log_likelihood", "log_likelihood_stderr")
FIGURES += ("examples",)

for word in sys.argv[1:] or [name for name in PLAN if not (RESULTS / f"{name}.json").exists()]:
    name, _, run_dir = word.partition("=")
    if name not in PLAN:
        sys.exit(f"{name} is not in results/plan.yaml, which has {', '.join(PLAN)}")
    measure(name, run_dir)
