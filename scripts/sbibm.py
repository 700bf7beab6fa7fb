"""sbibm's tasks (Lueckmann et al. 2021) by sbi's NPE, with our flow, nflows' and zuko's: how well a classifier tells
their posteriors from the references, and how long they train.

Each estimator, with the defaults of its library, is trained once for a task and a number of simulations, on the same
simulations, by sbi's own loop with its defaults, but for the learning rate of ours. Then 10,000 posterior samples for
each of ten observations are compared with the references. Times are CPU seconds on one thread. A training step is also
timed for the three in turns, since a busy machine slows one training more than another.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import sections
import torch
from c2st import c2sts

from flowtrain.runtime import files

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, KEPT = ROOT / "results" / "sbibm.json", ROOT / "docs" / "inference.md", ROOT / "data" / "sbibm"
BUDGETS, SAMPLES = (1_000, 10_000, 100_000), 10_000
PUBLISHED = {  # mean C2ST of NPE by budget
    "two_moons": (0.725, 0.606, 0.542),
    "slcp": (0.975, 0.901, 0.831),
    "gaussian_linear": (0.694, 0.552, 0.506),
    "gaussian_linear_uniform": (0.696, 0.553, 0.509),
    "gaussian_mixture": (0.731, 0.661, 0.555),
    "bernoulli_glm": (0.863, 0.678, 0.559),
}
LEARNING_RATES = {"ours": 2e-3, "nflows": 5e-4, "zuko": 5e-4}  # sbi's default is 5e-4
OBSERVATIONS = range(1, 11)
PAIRS = 3  # of samples whose classifiers are trained at a time: about what a core's cache holds


def builder(estimator: str, prior) -> Callable:
    """The density estimator of a name, with its defaults: sbi's have five layers of splines and networks of 50 units,
    ours three and 64."""
    from sbi.neural_nets import posterior_nn

    import flowtrain

    if estimator == "ours":
        return flowtrain.sbi.estimator(prior=prior)
    return posterior_nn({"nflows": "nsf", "zuko": "zuko_nsf"}[estimator])


def train(task, simulations: int, estimator: str) -> dict:
    """Posterior samples for each observation, (observations, 10,000, D), and what training took."""
    from sbi.inference import NPE

    theta, x = simulate(task, simulations)
    prior = task.get_prior_dist()
    torch.manual_seed(0)
    inference = NPE(
        prior, density_estimator=builder(estimator, prior), show_progress_bars=False, summary_writer=Nothing()
    )
    start, wall = time.process_time(), time.perf_counter()
    network = inference.append_simulations(theta, x).train(learning_rate=LEARNING_RATES[estimator])
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    posterior = inference.build_posterior(network)
    drawn = [
        posterior.sample((SAMPLES,), x=task.get_observation(i), show_progress_bars=False).numpy() for i in OBSERVATIONS
    ]
    return {
        "samples": np.stack(drawn),
        "learning_rate": LEARNING_RATES[estimator],
        "train_seconds": round(seconds, 1),
        "train_wall_seconds": round(wall, 1),
        "epochs": inference.summary["epochs_trained"][-1],
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def simulate(task, simulations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """θ of the prior and x, the same each time."""
    torch.manual_seed(simulations)
    theta = task.get_prior()(num_samples=simulations)
    return theta, task.get_simulator()(theta)


def step_times(task, rounds: int = 40) -> dict[str, float]:
    """The median CPU milliseconds of a training step of sbi's loop, on 200 rows, of each estimator in turns."""
    theta, x = simulate(task, 1_000)
    networks = {name: builder(name, task.get_prior_dist())(theta, x) for name in LEARNING_RATES}
    optimizers = {name: torch.optim.Adam(network.parameters(), 5e-4) for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in LEARNING_RATES}
    for _ in range(rounds):
        for name, network in networks.items():
            start = time.thread_time()
            optimizers[name].zero_grad()
            network.loss(theta[:200], x[:200]).mean().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizers[name].step()
            times[name].append(time.thread_time() - start)
    return {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()}


class Nothing:
    """A summary writer that writes nothing; sbi's default leaves files in the working directory."""

    log_dir = None

    def __getattr__(self, name):
        return lambda *arguments, **keys: None


def kept(task, simulations: int, estimator: str) -> dict:
    """What :func:`train` returns, from disk where it is there."""
    file = KEPT / f"{task.name}-{simulations}-{estimator}-{LEARNING_RATES[estimator]}.npz"
    if not file.exists():
        found = train(task, simulations, estimator)
        temporary = file.with_suffix(".tmp.npz")
        np.savez(temporary, **found)
        os.replace(temporary, file)
    with np.load(file) as found:
        return {name: found[name] if name == "samples" else found[name].item() for name in found.files}


def scores(task, samples: np.ndarray, observations: list[int]) -> dict[str, float]:
    """C2ST of the samples for each of some observations."""
    references = [task.get_reference_posterior_samples(i)[:SAMPLES].numpy() for i in observations]
    values = c2sts(np.stack(references), np.stack([samples[i - 1] for i in observations]))
    return {str(i): round(value, 4) for i, value in zip(observations, values)}


def tables(found: dict[str, dict], steps: dict[str, dict[str, float]]) -> str:
    """The means over observations, and the times of trainings and of steps; a dash for what is not measured yet."""
    lines = ["| task | simulations | ours | nflows | zuko | published | training: ours | nflows | zuko |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for task, published in PUBLISHED.items():
        for simulations, value in zip(BUDGETS, published):
            own = [found.get(f"{task} {simulations} {name}") for name in LEARNING_RATES]
            means = [score([*cell["c2st"].values()]) if cell else "–" for cell in own]
            seconds = [f"{cell['train_seconds']:,.0f} s" if cell else "–" for cell in own]
            lines.append("| " + " | ".join([task, f"{simulations:,}", *means, f"{value:.3f}", *seconds]) + " |")
    lines += ["", "| a training step of 200 rows, in turns | ours | nflows | zuko |", "|---|---:|---:|---:|"]
    for task, times in steps.items():
        lines.append("| " + " | ".join([task, *(f"{times[name]:.1f} ms" for name in LEARNING_RATES)]) + " |")
    return "\n".join(lines)


def score(values: list[float]) -> str:
    few = f" ({len(values)} of {len(OBSERVATIONS)})" if len(values) < len(OBSERVATIONS) else ""
    return f"{statistics.mean(values):.3f}{few}"


def main() -> None:
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description="sbibm's tasks by sbi's NPE with three libraries' flows")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=[*PUBLISHED])
    parser.add_argument("--simulations", type=numbers, default=[*BUDGETS])
    parser.add_argument("--observations", type=numbers, default=[*OBSERVATIONS])
    parser.add_argument("--estimators", type=lambda text: text.split(","), default=[*LEARNING_RATES])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--table", action="store_true", help="only write the table of docs/inference.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not options.table:
        measure(options)
    results = read()
    sections.write(PAGE, "sbibm", tables(results["cells"], results["step_milliseconds"]))


def read() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"step_milliseconds": {}, "cells": {}}


def write(part: str, name: str, value: dict) -> None:
    """Add one value to the file, which another process may change meanwhile; C2STs to those that it has."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read()
        results["machine"] = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "architecture": os.uname().machine,
        }
        if "c2st" in value:
            value["c2st"] = results[part].get(name, {}).get("c2st", {}) | value["c2st"]
        results[part][name] = value
        files.write_json(RESULTS, results)


def measure(options: argparse.Namespace) -> None:
    """Add what ``options`` ask for to the file, cell by cell."""
    sys.path.remove(str(Path(__file__).parent))  # where this file hides the package of its name
    import sbibm

    end = time.monotonic() + 60 * options.minutes
    for simulations, name, estimator in product(options.simulations, options.tasks, options.estimators):
        cell, task = f"{name} {simulations} {estimator}", sbibm.get_task(name)
        done = read()["cells"].get(cell, {}).get("c2st", {})
        missing = [i for i in options.observations if str(i) not in done]
        if not missing:
            continue
        if time.monotonic() > end:
            print("time is up; the same command continues", file=sys.stderr)
            return
        if name not in read()["step_milliseconds"]:
            write("step_milliseconds", name, step_times(task))
        found = kept(task, simulations, estimator)
        samples = found.pop("samples")
        for start in range(0, len(missing), PAIRS):
            row = {"c2st": scores(task, samples, missing[start : start + PAIRS])} | found
            write("cells", cell, row)
            print(cell, row, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
