"""The steps of scripts/newcomer that are not commands: ``newcomer.py STEP ARGUMENTS``."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch


def images(source: str, folder: str) -> None:
    """Copy the images of a folder or a zip file into a folder."""
    new = Path(folder)
    new.mkdir()
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            found = {Path(name).name: archive.read(name) for name in archive.namelist()}
    else:
        found = {path.name: path.read_bytes() for path in Path(source).rglob("*") if path.is_file()}
    for name, data in found.items():
        if name.lower().endswith((".jpg", ".jpeg", ".png")):
            (new / name).write_bytes(data)
    print(f"{len(list(new.iterdir()))} images")


def table(path: str) -> None:
    """Write scikit-learn's wines, the measurements in columns with names."""
    from sklearn.datasets import load_wine

    frame = load_wine(as_frame=True).data
    frame.to_csv(path, index=False)
    print(f"{len(frame)} rows, columns {', '.join(frame.columns)}")


def page(tests: str, path: str, run: str | None = None) -> None:
    """Open a page in headless Chromium at two widths and in both schemes, save screenshots beside it, and look for the
    figures of the run's eval.json."""
    sys.path.insert(0, tests)
    from browser import SIZES, open_browser

    with open_browser() as browser:
        for name, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                browser.open(Path(path), width, height, scheme)
                assert not browser.problems(), browser.problems()
                shot = Path(path).with_name(f"{Path(path).stem}_{name}_{scheme}.png")
                browser.screenshot(shot)
                print(shot)
        text = browser.run("return document.body.innerText")
    if run:
        figure = json.loads(next(Path(run).glob("eval/*/eval.json")).read_text())
        key = "bits_per_dim" if "bits_per_dim" in figure else "log_likelihood"
        assert f"{abs(figure[key]):.4f}" in text, f"the page lacks {key} {figure[key]}"
        print(f"the page shows {key} {figure[key]:.4f}")


def keep(run: str, path: str) -> None:
    """Keep the rows on which exports are compared, their noise, and flowtrain's log-likelihoods."""
    import flowtrain
    from flowtrain.data.spec import DataSpec
    from flowtrain.export.checks import Reference
    from flowtrain.export.programs import Program

    flow = flowtrain.load(run).eval().requires_grad_(False)
    reference = Reference(Program(flow, "log_prob").eval(), DataSpec("rows", flow.shape))
    log_prob = reference.program(*reference.inputs.values())
    np.savez(path, log_prob=log_prob, **reference.inputs)
    print(f"{len(log_prob)} examples, mean log-likelihood {log_prob.mean():.4f}")


def alone(folder: str) -> None:
    """Compute the log-likelihoods that were kept, by the exported programs alone."""
    import onnxruntime

    try:
        import flowtrain  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("flowtrain is still installed")
    kept = dict(np.load(f"{folder}/kept.npz"))
    expected = kept.pop("log_prob")
    session = onnxruntime.InferenceSession(f"{folder}/onnx/log_prob.onnx")
    inputs = {one.name: kept[one.name] for one in session.get_inputs()}
    program = torch.export.load(f"{folder}/torch/log_prob.pt2").module()
    found = {
        "ONNX Runtime": session.run(None, inputs)[0],
        "plain PyTorch": program(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy(),
    }
    for name, values in found.items():
        error = (np.abs(values - expected) / np.maximum(1, np.abs(expected))).max()
        print(f"{folder}: {name} agrees with flowtrain to {error:.1e} on {len(expected)} examples")
        assert error < 1e-5


step, *arguments = sys.argv[1:]
{"images": images, "table": table, "page": page, "keep": keep, "alone": alone}[step](*arguments)
