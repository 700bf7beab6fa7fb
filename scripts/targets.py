"""Reverse KL beside normflows': see scripts/targets."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import normflows as nf
import torch

from flowtrain.commands.eval_target import count_modes
from flowtrain.engine import importance
from flowtrain.runtime import files
from flowtrain.targets import DoubleWell, Funnel, Mixture40

ROOT = Path(__file__).parent.parent
TARGETS = {"funnel": Funnel, "mixture40": Mixture40, "double_well": DoubleWell}
COUPLINGS = {"funnel": 8, "mixture40": 4, "double_well": 4}
AFFINE = ("funnel",)  # Real NVP; the others, with several modes, get splines
HIDDEN, BATCH, SAMPLES = 64, 256, 50_000
OURS = {"reverse_kl": [], "reverse_kl, path gradient": ["objective.path_gradient=true"]}
HEAD = ["| target | trained by | steps | ELBO | log Z (exact) | ESS | modes |", "| --- " * 7 + "|"]
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
    for target in TARGETS:
        rows = found.setdefault(target, {})
        work = {f"flowtrain, {name}": (ours, words) for name, words in OURS.items()}
        work["normflows, reverse_kld"] = (theirs, True)
        work["normflows, reverse_kld(score_fn=False)"] = (theirs, False)
        for name, (run, how) in work.items():
            if name not in rows:
                rows[name] = run(target, minutes, how)
                print(f"{target}: {name}: {rows[name]}", flush=True)
                files.write_json(path, found)
    page = Path(args.folder) / "docs" / "targets.md"
    if page.is_file():
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}")
    print(table(found))


def ours(target: str, minutes: float, words: list[str]) -> dict:
    """The figures of a run of ``flowtrain train`` with its own defaults."""
    model = ["model=realnvp_vector", "norm=actnorm"] if target in AFFINE else ["model=nsf_coupling"]
    model += [f"model.pairs={COUPLINGS[target] // 2}", f"model.hidden={HIDDEN}"]
    with tempfile.TemporaryDirectory() as folder:
        run = [f"hydra.run.dir={folder}/run", "objective=reverse_kl", f"target={target}", f"batch_size={BATCH}"]
        budget = [f"max_minutes={minutes}", "max_steps=null", "threads=1", "report=false", "trainer.sample_every=null"]
        _flowtrain("train", *run, *model, *budget, *words)
        report = json.loads(_flowtrain("eval", f"ckpt={folder}/run", "json=true", "threads=1"))
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    keys = ("elbo", "elbo_stderr", "log_z", "log_z_stderr", "log_z_exact", "ess", "ess_stderr", "modes_found", "modes")
    return {"steps": summary["steps"], **{key: report.get(key) for key in keys}}


def _flowtrain(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "flowtrain", *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def theirs(name: str, minutes: float, score_fn: bool) -> dict:
    """The figures of normflows' flow of the same couplings, trained by its reverse KL with Adam."""
    target = TARGETS[name]()
    torch.manual_seed(1)
    d, flows = target.dimensions, []
    for i in range(COUPLINGS[name]):
        if name in AFFINE:
            net = nf.nets.MLP([(d + 1) // 2, HIDDEN, HIDDEN, 2 * (d // 2)], init_zeros=True)
            flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(d, "swap"), nf.flows.ActNorm(d)]
        else:
            mask = i % 2 == 1
            spline = nf.flows.CoupledRationalQuadraticSpline(d, 2, HIDDEN, num_bins=8, tail_bound=3, reverse_mask=mask)
            flows += [spline, nf.flows.LULinearPermute(d)]
    base = nf.distributions.DiagGaussian(d)
    with torch.no_grad():
        base.log_scale.fill_(torch.tensor(target.scale).log())  # as ours starts
    model = nf.NormalizingFlow(base, flows, target)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps, end = 0, time.monotonic() + 60 * minutes
    while time.monotonic() < end:
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
        log_w = (target.log_prob(x) - log_q).double()
    log_z, ess = importance.log_z(log_w), importance.effective_share(log_w)
    return {
        "steps": steps,
        "elbo": log_w.mean().item(),
        "elbo_stderr": (log_w.std() / len(log_w) ** 0.5).item(),
        "log_z": log_z.value,
        "log_z_stderr": log_z.stderr,
        "log_z_exact": target.log_z,
        "ess": ess.value,
        "ess_stderr": ess.stderr,
        "modes_found": count_modes(target, x) if target.modes else None,
        "modes": target.modes,
    }


def table(found: dict) -> str:
    lines = [*HEAD]
    for target in TARGETS:
        for name, row in found.get(target, {}).items():
            modes = f"{row['modes_found']} of {row['modes']}" if row["modes"] else ""
            cells = [
                target,
                name,
                f"{row['steps']:,}",
                f"{row['elbo']:.3f} ± {row['elbo_stderr']:.3f}",
                f"{row['log_z']:.3f} ± {row['log_z_stderr']:.3f} ({row['log_z_exact']:.3f})",
                f"{100 * row['ess']:.1f} ± {100 * row['ess_stderr']:.1f} %",
                modes,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
