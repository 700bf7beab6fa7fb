"""The AUROC of density and of typicality for two kinds of images that a model of CIFAR-10 was not trained on."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import sections
from PIL import Image, ImageFilter
from torchvision import datasets

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scores.md"
BLUR = 1  # pixels, the deviation of the Gaussian
IMAGES = 2000  # of each kind


def arrays(root: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Test images of CIFAR-10; test images of MNIST, enlarged to 3×32×32, and other ones of CIFAR-10, blurred: uint8
    (IMAGES, 3, 32, 32) each."""
    photos = datasets.CIFAR10(root, train=False).data
    digits = [
        np.asarray(Image.fromarray(image.numpy()).resize((32, 32), Image.Resampling.BILINEAR))
        for image in datasets.MNIST(root, train=False).data[:IMAGES]
    ]
    blurred = [
        np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR)))
        for image in photos[IMAGES : 2 * IMAGES]
    ]
    return photos[:IMAGES].transpose(0, 3, 1, 2), {
        "MNIST, enlarged": np.repeat(np.stack(digits)[:, None], 3, 1),
        f"CIFAR-10, blurred by {BLUR} pixel": np.stack(blurred).transpose(0, 3, 1, 2),
    }


def score(run: str, folder: Path) -> dict:
    """What ``flowtrain score`` says of images.npy beside usual.npy."""
    words = f"ckpt={run} input={folder}/images.npy calibration={folder}/usual.npy output={folder}/scores.csv"
    command = [
        sys.executable,
        "-m",
        "flowtrain",
        "score",
        *words.split(),
        "pvalue=true",
        "typicality=true",
        "json=true",
    ]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main(run: str, root: str) -> None:
    rows = [
        "| images | bits/dim | AUROC of density | AUROC of typicality | p ≤ 0.01 | two-sided p ≤ 0.01 |",
        "|---|---|---|---|---|---|",
    ]
    usual, kinds = arrays(root)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "usual.npy", usual)
        for name, images in kinds.items():
            np.save(Path(folder) / "images.npy", images)
            found = score(run, Path(folder))
            shares = [f"{100 * found[key] / found['rows']:.1f} %" for key in ("alarms", "alarms_two_sided")]
            figures = [f"{found[key]:.4f}" for key in ("bits_per_dim", "auroc_log_likelihood", "auroc_typicality")]
            rows.append("| " + " | ".join([name, *figures, *shares]) + " |")
            print(rows[-1], flush=True)
    sections.write(PAGE, "out of distribution", "\n".join(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
