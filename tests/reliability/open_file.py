"""Opens a file as a data set does in training, in a process of its own: exit code 0, or one line and 1 or 2."""

import resource
import sys

import torch

from flowtrain import data
from flowtrain.errors import FlowtrainError

SETS = {
    "table": lambda path: data.Table(path=path, missing="drop"),
    "arrays": lambda path: data.Arrays(path=path),
    "images": lambda path: data.ImageFolder(path=path, image_size=8),
}


def main() -> None:
    """Open ``sys.argv[2]`` as ``sys.argv[1]``, read some examples, and print the peak memory in bytes."""
    try:
        dataset = SETS[sys.argv[1]](sys.argv[2])
        split = dataset.split("train")
        x, _ = split.take(torch.arange(min(len(split), 4))) if not split.streams else split.read([0], False)[1:]
        assert tuple(x.shape[1:]) == tuple(dataset.spec.shape), (x.shape, dataset.spec)
    except FlowtrainError as error:
        print(f"flowtrain: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    finally:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
