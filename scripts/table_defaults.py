"""Measure which batch size and learning rate serve tables and toys best in the same time of one core."""

import json
import lzma
import math
import os
import tempfile
import time
from pathlib import Path
from statistics import mean

import pandas as pd
import sections
import torch
from sklearn import datasets as sklearn_sets

from flowtrain import train
from flowtrain.config.compose import train_config

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "table_defaults.json"
SECONDS = 15.0  # of one core
BATCHES, RATES, SEEDS = (64, 256, 1024), (1e-3, 3e-3), (1, 2)
MODEL = "nsf_autoregressive"
QUIET = ("trainer.log_every=100000", "trainer.sample_every=null", "logger=none")


def write_tables(folder: Path) -> dict[str, list[str]]:
    """Write three tables; the words that choose each of the six data sets."""
    for name in ("breast_cancer", "diabetes"):
        rows = getattr(sklearn_sets, f"load_{name}")().data
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False, header=[f"x{i}" for i in range(rows.shape[1])])
    power = Path(os.environ.get("FLOWTRAIN_SHARED", ROOT.parent / "shared")) / "data" / "power_sample"
    text = lzma.open(next(power.glob("*.xz"))).read().decode().replace("?", "")
    (folder / "power.csv").write_text(text)
    tables = {name: ["dataset=table", f"dataset.path={folder}/{name}.csv"] for name in ("breast_cancer", "diabetes")}
    columns = "[Global_active_power,Global_reactive_power,Voltage,Global_intensity]"
    tables["power"] = ["dataset=table", f"dataset.path={folder}/power.csv", f"dataset.columns={columns}"]
    tables["power"].append("dataset.missing=drop")
    return {name: [f"dataset={name}"] for name in ("moons", "checkerboard", "pinwheel")} | tables


def run(words: list[str], steps: int) -> tuple[dict, float]:
    """Train; the summary and the seconds of CPU time."""
    config = train_config(f"model={MODEL}", *words, f"max_steps={steps}", *QUIET)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        summary = train.main(config, folder)
        return summary, time.process_time() - start


def steps_in(words: list[str]) -> int:
    """The number of steps that SECONDS of one core allow, validations included."""
    short, long = (run(words, steps)[1] for steps in (20, 270))
    return max(50, math.floor(SECONDS * 250 / (long - short)))


def measure() -> list[dict]:
    """A row for each data set, batch size and rate: the mean validation nats of all seeds."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, words in write_tables(Path(folder)).items():
            for batch in BATCHES:
                if name in ("breast_cancer", "diabetes") and batch > 256:
                    continue  # more than the train split
                sized = [*words, f"batch_size={batch}"]
                steps = steps_in(sized)
                for rate in RATES:
                    runs = [run([*sized, f"optimizer.lr={rate}", f"seed={seed}"], steps)[0] for seed in SEEDS]
                    figures = [summary["log_likelihood"] for summary in runs]
                    row = {"data": name, "batch_size": batch, "lr": rate, "steps": steps, "nats": figures}
                    print(json.dumps(row), flush=True)
                    found.append(row)
    return found


def page(rows: list[dict]) -> str:
    """A Markdown table: a row for each data set, a column for each batch size and rate."""
    kinds = [(batch, rate) for batch in BATCHES for rate in RATES]
    lines = ["| data | " + " | ".join(f"{batch}, {rate:g}" for batch, rate in kinds) + " |", "|---" * 7 + "|"]
    for name in dict.fromkeys(row["data"] for row in rows):
        cells = {(row["batch_size"], row["lr"]): mean(row["nats"]) for row in rows if row["data"] == name}
        best = max(cells.values())
        texts = [f"{cells[kind]:.3f}" if kind in cells else "–" for kind in kinds]
        texts = [f"**{text}**" if cells.get(kind) == best else text for kind, text in zip(kinds, texts)]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = measure()
    RESULT.write_text(
        json.dumps({"model": MODEL, "seconds": SECONDS, "torch": torch.__version__, "rows": rows}, indent=2)
    )
    sections.write(ROOT / "docs" / "data.md", "table defaults", page(rows))
