"""sbibm's tasks (Lueckmann et al. 2021) by sbi's NPE, with our flow, nflows' and zuko's: how well a classifier tells
their posteriors from the references, and how long they train.

Each estimator, with the defaults of its library, is trained once for a task and a number of simulations, on the same
simulations, by sbi's own loop with its defaults. Then 10,000 posterior samples for each observation are kept, and
compared with the reference one after the other. Times are CPU seconds on one thread. A training step is also timed for
the three in turns, since a busy machine slows one training more than another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import sections
import torch

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
ESTIMATORS = ("ours", "nflows", "zuko")


def builder(estimator: str, prior) -> Callable:
    """The density estimator of a name, with its defaults: sbi's have five layers of splines and networks of 50 units,
    ours three and 64."""
    from sbi.neural_nets import posterior_nn

    import flowtrain

    if estimator == "ours":
        return flowtrain.sbi.estimator(prior=prior)
    return posterior_nn({"nflows": "nsf", "zuko": "zuko_nsf"}[estimator])


def train(task, simulations: int, estimator: str, observations: int) -> dict:
    """Posterior samples for each observation, (observations, 10,000, D), and what training took."""
    from sbi.inference import NPE

    theta, x = simulate(task, simulations)
    prior = task.get_prior_dist()
    torch.manual_seed(0)
    inference = NPE(
        prior, density_estimator=builder(estimator, prior), show_progress_bars=False, summary_writer=Nothing()
    )
    start, wall = time.process_time(), time.perf_counter()
    network = inference.append_simulations(theta, x).train()
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    posterior = inference.build_posterior(network)
    drawn = [
        posterior.sample((SAMPLES,), x=task.get_observation(i), show_progress_bars=False)
        for i in range(1, observations + 1)
    ]
    return {
        "samples": torch.stack(drawn).numpy(),
        "seconds": seconds,
        "wall": wall,
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
    networks = {name: builder(name, task.get_prior_dist())(theta, x) for name in ESTIMATORS}
    optimizers = {name: torch.optim.Adam(network.parameters(), 5e-4) for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
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
    file = KEPT / f"{task.name}-{simulations}-{estimator}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        found = train(task, simulations, estimator, 10)
        temporary = file.with_suffix(".tmp.npz")
        np.savez(temporary, **found)
        os.replace(temporary, file)
    with np.load(file) as found:
        return {name: found[name] if name == "samples" else found[name].item() for name in found.files}


def cells(options: argparse.Namespace) -> Iterator[tuple[str, int, str, int]]:
    """What is to be measured: an observation of all tasks, then the next one; all estimators after one another."""
    for simulations in options.simulations:
        for observation in options.observations:
            for task in options.tasks:
                yield from ((task, simulations, estimator, observation) for estimator in options.estimators)


def tables(found: list[dict], steps: dict[str, dict[str, float]]) -> str:
    """The means over observations, and the times of trainings and of steps, with what is not measured yet."""
    lines = ["| task | simulations | ours | nflows | zuko | published | training: ours | nflows | zuko |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for task, published in PUBLISHED.items():
        for simulations, value in zip(BUDGETS, published):
            own = {
                name: [
                    row
                    for row in found
                    if (row["task"], row["simulations"], row["estimator"]) == (task, simulations, name)
                ]
                for name in ESTIMATORS
            }
            scores = [score([row["c2st"] for row in rows]) for rows in own.values()]
            seconds = [f"{rows[0]['train_seconds']:,.0f} s" if rows else "–" for rows in own.values()]
            cells = [task, f"{simulations:,}", *scores, f"{value:.3f}", *seconds]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| a training step of 200 rows, in turns | ours | nflows | zuko |", "|---|---:|---:|---:|"]
    for task, times in steps.items():
        lines.append("| " + " | ".join([task, *(f"{times[name]:.1f} ms" for name in ESTIMATORS)]) + " |")
    return "\n".join(lines)


def score(values: list[float]) -> str:
    if not values:
        return "not measured yet"
    few = f" ({len(values)} of 10)" if len(values) < 10 else ""
    return f"{statistics.mean(values):.3f}{few}"


def main() -> None:
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description="sbibm's tasks by sbi's NPE with three libraries' flows")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=[*PUBLISHED])
    parser.add_argument("--simulations", type=numbers, default=[*BUDGETS])
    parser.add_argument("--observations", type=numbers, default=[*range(1, 11)])
    parser.add_argument("--estimators", type=lambda text: text.split(","), default=[*ESTIMATORS])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--table", action="store_true", help="only write the table of docs/inference.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found, steps = results.get("cells", []), results.get("step_milliseconds", {})
    if not options.table:
        measure(options, found, steps)
    sections.write(PAGE, "sbibm", tables(found, steps))


def measure(options: argparse.Namespace, found: list[dict], steps: dict[str, dict[str, float]]) -> None:
    """Add what ``options`` ask for to ``found``, to ``steps`` and to the file, cell by cell."""
    sys.path.remove(str(Path(__file__).parent))  # where this file hides the package of its name
    import sbibm

    from flowtrain.engine.calibration import c2st

    end = time.monotonic() + 60 * options.minutes
    done = {(row["task"], row["simulations"], row["estimator"], row["observation"]) for row in found}
    for cell in cells(options):
        if cell in done:
            continue
        if time.monotonic() > end:
            print("time is up; the same command continues", file=sys.stderr)
            return
        name, simulations, estimator, observation = cell
        task = sbibm.get_task(name)
        if name not in steps:
            steps[name] = step_times(task)
        trained = kept(task, simulations, estimator)
        reference = task.get_reference_posterior_samples(observation)[:SAMPLES].numpy()
        row = {
            "task": name,
            "simulations": simulations,
            "estimator": estimator,
            "observation": observation,
            "c2st": round(c2st(reference, trained["samples"][observation - 1]), 4),
            "train_seconds": round(trained["seconds"], 1),
            "train_wall_seconds": round(trained["wall"], 1),
            "epochs": trained["epochs"],
            "parameters": trained["parameters"],
        }
        found.append(row)
        machine = {"date": date.today().isoformat(), "torch": torch.__version__, "architecture": os.uname().machine}
        temporary = RESULTS.with_suffix(".tmp")
        results = {"machine": machine, "step_milliseconds": steps, "cells": found}
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(temporary, RESULTS)
        print(row, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
