"""Reverse KL beside normflows': see scripts/targets."""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import normflows as nf
import torch

from flowtrain.commands.eval_target import count_modes
from flowtrain.engine import importance
from flowtrain.runtime import files
from flowtrain.targets import DoubleWell, EightSchools, Funnel, ManyWell, Mixture40, Phi4, Target

ROOT = Path(__file__).parent.parent
TARGETS = {
    "mixture40": Mixture40,
    "funnel": Funnel,
    "many_well": ManyWell,
    "double_well": DoubleWell,
    "eight_schools": EightSchools,
    "phi4": Phi4,
}
AFFINE = ("funnel", "eight_schools")  # Real NVP of eight couplings; the others get four couplings of splines
HIDDEN, BATCH, SAMPLES = 64, 512, 50_000
OURS = "flowtrain, reverse_kl"
HEAD = ["| target | trained by | seconds | steps | ELBO | log Z (exact) | ESS | Pareto k | modes |", "| --- " * 9 + "|"]
BEGIN, END = "<!-- scripts/targets -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description="Reverse KL beside normflows'.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("folder", nargs="?", default=str(ROOT))
    args = parser.parse_args()
    minutes = 0.03 if args.smoke else args.minutes
    path = Path(args.folder) / "results" / "targets.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    found = json.loads(path.read_text()) if path.is_file() else {"minutes": minutes, "machine": platform.machine()}
    torch.set_num_threads(1)
    for score_fn in (True, False):
        for target in TARGETS:
            rows = found.setdefault(target, {})
            work = {OURS: partial(ours, target, minutes)}
            name = "normflows, reverse_kld" if score_fn else "normflows, reverse_kld(score_fn=False)"
            work[name] = lambda: theirs(target, rows[OURS]["cpu_seconds"], score_fn)
            for name, run in work.items():
                if name not in rows:
                    rows[name] = run()
                    print(f"{target}: {name}: {rows[name]}", flush=True)
                    files.write_json(path, found)
    page = Path(args.folder) / "docs" / "targets.md"
    if page.is_file():
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}")
    print(table(found))


def couplings(target: str) -> int:
    return 8 if target in AFFINE else 4


def ours(target: str, minutes: float) -> dict:
    """The figures of a run of ``flowtrain train`` with its own defaults."""
    model = ["model=realnvp_vector", "norm=actnorm"] if target in AFFINE else ["model=nsf_coupling"]
    model += [f"model.pairs={couplings(target) // 2}", f"model.hidden={HIDDEN}"]
    with tempfile.TemporaryDirectory() as folder:
        run = [f"hydra.run.dir={folder}/run", "objective=reverse_kl", f"target={target}", f"batch_size={BATCH}"]
        budget = [f"max_minutes={minutes}", "max_steps=null", "threads=1", "report=false", "trainer.sample_every=null"]
        before = cpu_seconds_of_children()
        _flowtrain("train", *run, *model, *budget)
        seconds = cpu_seconds_of_children() - before
        report = json.loads(_flowtrain("eval", f"ckpt={folder}/run", "json=true", "threads=1"))
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    keys = ("elbo", "elbo_stderr", "log_z", "log_z_stderr", "log_z_exact", "ess", "ess_stderr", "pareto_shape")
    return {
        "cpu_seconds": seconds,
        "steps": summary["steps"],
        **{key: report.get(key) for key in (*keys, "modes_found", "modes")},
    }


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _flowtrain(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "flowtrain", *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


class Scaled(nf.distributions.Target):
    """A target in units of its scale, as ours is trained: one that normflows' bounded splines and base are made for."""

    def __init__(self, target: Target):
        super().__init__()
        self.target = target

    def log_prob(self, z):
        return self.target.log_prob(self.target.scale * z) + self.target.dimensions * math.log(self.target.scale)


def theirs(name: str, seconds: float, score_fn: bool) -> dict:
    """The figures of normflows' flow of the same couplings, trained by its reverse KL with Adam for as many seconds of
    the processor as ours, from the start of its process, had."""
    target = TARGETS[name]()
    torch.manual_seed(1)
    d, flows = target.dimensions, []
    for i in range(couplings(name)):
        if name in AFFINE:
            net = nf.nets.MLP([(d + 1) // 2, HIDDEN, HIDDEN, 2 * (d // 2)], init_zeros=True)
            flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(d, "swap"), nf.flows.ActNorm(d)]
        else:
            mask = i % 2 == 1
            spline = nf.flows.CoupledRationalQuadraticSpline(d, 2, HIDDEN, num_bins=8, tail_bound=3, reverse_mask=mask)
            flows += [spline, nf.flows.LULinearPermute(d)]
    scaled = Scaled(target)
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(d), flows, scaled)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps, end = 0, time.process_time() + seconds
    while time.process_time() < end:
        loss = model.reverse_kld(BATCH, score_fn=score_fn)
        optimizer.zero_grad()
        if loss.isfinite():  # as in normflows' examples
            loss.backward()
            optimizer.step()
        steps += 1
    with torch.no_grad():
        model.eval()
        parts = [model.sample(5000) for _ in range(SAMPLES // 5000)]
        x, log_q = (torch.cat(part) for part in zip(*parts))
        log_w = (scaled.log_prob(x) - log_q).double()
    log_z, ess = importance.log_z(log_w), importance.effective_share(log_w)
    return {
        "cpu_seconds": seconds,
        "steps": steps,
        "elbo": log_w.mean().item(),
        "elbo_stderr": (log_w.std() / len(log_w) ** 0.5).item(),
        "log_z": log_z.value,
        "log_z_stderr": log_z.stderr,
        "log_z_exact": target.log_z,
        "ess": ess.value,
        "ess_stderr": ess.stderr,
        "pareto_shape": importance.pareto_shape(log_w),
        "modes_found": count_modes(target, target.scale * x) if target.modes else None,
        "modes": target.modes,
    }


def table(found: dict) -> str:
    lines = [*HEAD]
    for target in TARGETS:
        for name, row in sorted(found.get(target, {}).items()):
            modes = f"{row['modes_found']:,} of {row['modes']:,}" if row["modes"] else ""
            exact = "" if row["log_z_exact"] is None else f" ({row['log_z_exact']:.3f})"
            cells = [
                target,
                name,
                f"{row['cpu_seconds']:.0f}",
                f"{row['steps']:,}",
                f"{row['elbo']:.3f} ± {row['elbo_stderr']:.3f}",
                f"{row['log_z']:.3f} ± {row['log_z_stderr']:.3f}{exact}",
                f"{100 * row['ess']:.1f} ± {100 * row['ess_stderr']:.1f} %",
                f"{row['pareto_shape']:.2f}",
                modes,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
