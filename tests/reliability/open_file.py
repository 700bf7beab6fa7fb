"""Opens a file as a data set does in training, in a process of its own: exit code 0, or one line and 1 or 2."""

import logging
import resource
import sys

import h5py  # noqa: F401  (here and below: imported once, for all processes)
import openpyxl  # noqa: F401
import pandas  # noqa: F401
import pyarrow.compute
import pyarrow.parquet  # noqa: F401
import torch
import zarr  # noqa: F401

from flowtrain import data
from flowtrain.cli.exit_codes import describe_error
from flowtrain.errors import FlowtrainError

SETS = {
    "table": lambda path: data.Table(path=path, missing="drop"),
    "table with gaps": lambda path: data.Table(path=path, missing="model"),
    "arrays": lambda path: data.Arrays(path=path),
    "images": lambda path: data.ImageFolder(path=path, image_size=8),
    "labelled images": lambda path: data.ImageFolder(path=path, image_size=8, context="label", on_bad="skip"),
}


def main() -> None:
    """Open ``sys.argv[2]`` as ``sys.argv[1]``, read some examples, and print the peak memory in bytes."""
    logging.basicConfig(format="warning: %(message)s")
    try:
        dataset = SETS[sys.argv[1]](sys.argv[2])
        for name in ("train", "val"):
            split = dataset.split(name)
            x, _ = split.take(torch.arange(min(len(split), 4)))
            assert tuple(x.shape[1:]) == tuple(dataset.spec.shape), (x.shape, dataset.spec)
    except FlowtrainError as error:
        text, code = describe_error(error)
        print(f"flowtrain: {text}", file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
