"""How near flowtrain.fit(model="auto") comes to a random search and to the usual densities, on eight tables."""

import argparse
import json
import lzma
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import sections
import torch
from sklearn import datasets as sklearn_sets
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

import flowtrain
from flowtrain.data import Spirals
from flowtrain.data.patches import Patches
from flowtrain.inference.given import given

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "density.json"
SHARED = Path(os.environ.get("FLOWTRAIN_SHARED", ROOT.parent / "shared")) / "data"
TESTED, SEED = 20_000, 1  # most rows for the test; the seed of all splits
KERNELS = 20_000  # most rows of a kernel density estimate, and of a mixture
CORNER = [0, 1, 2, 8, 9, 10, 16, 17, 18]  # of a patch of 8×8 pixels, 3×3
Density = Callable[[np.ndarray], np.ndarray]  # log p of rows


@cache
def power() -> np.ndarray:
    """Measurements of a household, rounded by the meter: four columns."""
    text = lzma.open(next((SHARED / "power_sample").glob("*.xz"))).read().decode().splitlines()
    rows = [line.split(";") for line in text if "?" not in line]
    names = ["Global_active_power", "Global_reactive_power", "Voltage", "Global_intensity"]
    return np.array([[float(row[rows[0].index(name)]) for name in names] for row in rows[1:]])


def photographs() -> np.ndarray:
    data = Patches(path=str(SHARED / "bsds300_images"), train_patches=1_000_000, val_patches=1, test_patches=1)
    return data.split("train").data[:, CORNER].numpy()


def toy(kind, rows: int) -> np.ndarray:
    return kind(rows=rows)._draw(rows, np.random.default_rng(0))


TABLES: dict[str, Callable[[], np.ndarray]] = {
    "iris": lambda: sklearn_sets.load_iris().data,
    "wine": lambda: sklearn_sets.load_wine().data,
    "diabetes": lambda: sklearn_sets.load_diabetes(scaled=False).data,
    "breast_cancer": lambda: sklearn_sets.load_breast_cancer().data,
    "spirals": lambda: toy(Spirals, 2_500),
    "power, 9,568 rows": lambda: power()[np.random.default_rng(0).permutation(len(power()))[:9_568]],
    "power": power,
    "photographs": photographs,
}


def split(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows for fitting, of which some validate, and a fifth for the test."""
    order = np.random.default_rng(SEED).permutation(len(rows))
    tests = min(len(rows) // 5, TESTED)
    return rows[order[tests:]], rows[order[:tests]]


def auto(rows: np.ndarray, options) -> tuple[Density, dict]:
    flow = flowtrain.fit(rows, model="auto", minutes=options.minutes, seed=SEED, progress=False)
    return density(flow), {"chosen": flow.fitted.model, "why": flow.fitted.why, "seconds": flow.fitted.seconds}


def random_search(rows: np.ndarray, options) -> tuple[Density, dict]:
    """The best on validation of flows that are drawn at random."""
    random, best, began = np.random.default_rng(SEED), None, time.monotonic()
    for _ in range(options.runs):
        model, keys = draw(random)
        try:
            flow = flowtrain.fit(
                rows, model=model, minutes=options.search_seconds / 60, seed=SEED, options=keys, progress=False
            )
        except RuntimeError as error:  # it diverged
            print(f"  {model} {keys}: {error}", file=sys.stderr, flush=True)
            continue
        if best is None or flow.fitted.log_likelihood > best.fitted.log_likelihood:
            best, chosen = flow, f"{model} {keys}"
    return density(best), {"chosen": chosen, "seconds": time.monotonic() - began, "runs": options.runs}


def draw(random: np.random.Generator) -> tuple[str, dict]:
    """A family, its depth and width, and how it is trained."""
    model = str(random.choice(["nsf_autoregressive", "nsf_coupling", "maf"]))
    depth = {"nsf_autoregressive": "steps", "nsf_coupling": "pairs", "maf": "steps"}[model]
    keys = {
        f"model.{depth}": int(random.integers(1, 9 if model == "maf" else 6)),
        "model.hidden": int(random.choice([32, 64, 128, 256])),
        "model.dropout": float(random.choice([0.0, 0.1, 0.2, 0.5])),
        "optimizer.lr": float(np.exp(random.uniform(np.log(3e-4), np.log(1e-2)))),
        "optimizer.weight_decay": float(random.choice([0.0, 0.01, 0.1])),
    }
    return model, keys


def density(flow) -> Density:
    @torch.no_grad()
    def log_prob(rows: np.ndarray) -> np.ndarray:
        return torch.cat([flow.log_prob(part) for part in torch.from_numpy(rows).split(2000)]).double().numpy()

    return log_prob


def gaussian_mixture(rows: np.ndarray, options) -> tuple[Density, dict]:
    """scikit-learn's, of the number of components and the kind of covariance that validation prefers."""
    train, val, back = standardized(rows)
    tried = {}
    began = time.monotonic()
    for kind in ("full", "tied", "diag", "spherical"):
        for components in (1, 2, 3, 5, 8, 12, 20, 32, 50):
            if 3 * components < len(train):
                try:
                    model = GaussianMixture(components, covariance_type=kind, random_state=SEED).fit(train[:KERNELS])
                except ValueError:  # a covariance is singular
                    continue
                tried[kind, components] = model.score(val), model
    best = max(tried, key=lambda key: tried[key][0])
    return back(tried[best][1].score_samples), {"chosen": f"{best[1]} × {best[0]}", "seconds": time.monotonic() - began}


def kernel_density(rows: np.ndarray, options) -> tuple[Density, dict]:
    """scikit-learn's, of the bandwidth that validation prefers."""
    train, val, back = standardized(rows)
    began, tried = time.monotonic(), {}
    for width in np.geomspace(0.01, 2, 20):
        model = KernelDensity(bandwidth=width, rtol=1e-4).fit(train[:KERNELS])
        tried[width] = model.score(val[:1000]), model
    best = max(tried, key=lambda key: tried[key][0])
    return back(tried[best][1].score_samples), {"chosen": f"bandwidth {best:.3g}", "seconds": time.monotonic() - began}


def standardized(rows: np.ndarray):
    """The rows that flowtrain.fit trains on and validates with, at mean 0 and deviation 1; what maps a density back."""
    data = given(rows, seed=SEED)
    train, val = (part.data.double().numpy() for part in (data.train, data.val))
    mean, std = train.mean(0), train.std(0)

    def back(log_prob: Density) -> Density:
        return lambda rows: log_prob((rows - mean) / std) - np.log(std).sum()

    return (train - mean) / std, (val - mean) / std, back


METHODS = {
    "auto": auto,
    "gaussian_mixture": gaussian_mixture,
    "kernel_density": kernel_density,
    "random_search": random_search,
}


def measure(name: str, found: dict, options) -> None:
    """Add to ``found`` what is not there yet of a table; each method's log-likelihoods of the test rows are kept."""
    rows = TABLES[name]()
    fitting, testing = split(rows)
    table = found.setdefault(name, {"rows": len(rows), "columns": rows.shape[1], "methods": {}})
    folder = RESULT.parent / ".density"
    folder.mkdir(exist_ok=True)
    for method, run in METHODS.items():
        each = folder / f"{name}-{method}.npy"
        if method in table["methods"] and each.exists():
            continue
        log_prob, about = run(fitting, options)
        nats = log_prob(testing)
        np.save(each, nats)
        about |= {"load": round(os.getloadavg()[1], 1), "cores": os.cpu_count()}  # what else ran then
        table["methods"][method] = about | {"nats": float(nats.mean()), "stderr": float(nats.std() / len(nats) ** 0.5)}
        print(f"{name}: {method} {table['methods'][method]}", file=sys.stderr, flush=True)
        _compare(table["methods"], lambda method: np.load(folder / f"{name}-{method}.npy"))
        RESULT.write_text(json.dumps({"budget": budget(options), "tables": found}, indent=1, ensure_ascii=False) + "\n")


def _compare(methods: dict, each: Callable[[str], np.ndarray]) -> None:
    """Add to each method how far it is ahead of auto on the same rows."""
    own = each("auto")
    for method, found in methods.items():
        gap = each(method) - own
        found |= {"ahead_of_auto": float(gap.mean()), "ahead_stderr": float(gap.std() / len(gap) ** 0.5)}


def budget(options) -> dict:
    return {"auto_minutes": options.minutes, "search_runs": options.runs, "search_seconds_each": options.search_seconds}


def page(result: dict) -> str:
    """A Markdown table: nats a row of the test rows, and how far each rival is ahead of auto."""
    titles = {
        "random_search": "random search",
        "gaussian_mixture": "Gaussian mixture",
        "kernel_density": "kernel density",
    }
    lines = ["| table | rows × columns | auto chose | auto, nats | " + " | ".join(titles.values()) + " |"]
    lines.append("|---" * 7 + "|")
    for name in TABLES:
        table = result["tables"].get(name)
        if table is None or "auto" not in table["methods"]:
            lines.append(f"| {name} | not measured | | | | | |")
            continue
        own = table["methods"]["auto"]
        cells = [
            name,
            f"{table['rows']:,} × {table['columns']}",
            own["chosen"],
            f"{own['nats']:.3f} ± {own['stderr']:.3f}",
        ]
        for method in titles:
            rival = table["methods"].get(method)
            if rival is None:
                cells.append("not measured")
            else:
                ahead = f"{rival['ahead_of_auto']:+.3f} ± {rival['ahead_stderr']:.3f}"
                within = rival["ahead_of_auto"] <= 2 * rival["ahead_stderr"]
                cells.append(ahead if within else f"**{ahead}**")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", conditions(result)])


def conditions(result: dict) -> str:
    """With what budgets, and beside how much other work, the figures were measured."""
    found = [method for table in result["tables"].values() for method in table["methods"].values()]
    loads, own = sorted(method["load"] for method in found), result["budget"]
    return (
        f"auto had {60 * own['auto_minutes']:g} s for each table, the random search {own['search_runs']} runs of"
        f" {own['search_seconds_each']:g} s each, the mixtures and kernel densities as long as they took. The load"
        f" average of the machine's {found[0]['cores']} cores was {loads[0]:g} to {loads[-1]:g}: where that exceeds the"
        " cores, flows had a share of one."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all")
    parser.add_argument("--minutes", type=float, default=1.0, help="of model='auto' on a table")
    parser.add_argument("--runs", type=int, default=30, help="of the random search")
    parser.add_argument("--search-seconds", type=float, default=10.0, help="of each of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULT.read_text())["tables"] if RESULT.exists() else {}
    for name in options.tables or TABLES:
        measure(name, found, options)
    sections.write(ROOT / "docs" / "fit.md", "density tables", page(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
