"""Check and measure flowtrain on a GPU, in parts: see scripts/gpu."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from on_gpu import carried, page
from on_gpu.parts import STAGES, named
from on_gpu.runner import run

from flowtrain.runtime import distributed

RESULTS = Path("results/gpu.json")


def main() -> int:
    options = arguments()
    if options.wheels:
        return carried.collect_wheels(options.wheels)
    if options.data:
        return carried.cut(Path(options.data[1]), Path(options.data[0]))
    if options.stage == "page":
        return page.write(Path("docs/gpu.md"), read(options.results or RESULTS))
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        folder = Path(tempfile.mkdtemp(prefix="flowtrain-rehearsal-"))
        every = [part for stage in STAGES.values() for part in stage.parts]
        path = options.results or folder / "gpu.json"
        return run(named(options.parts, every), {}, path, options.seconds or 600, at_once=2, tiny=True)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if not distributed.gpus():
        sys.exit("scripts/gpu: there is no GPU here; --rehearse runs every part on the CPU")
    stage = STAGES[options.stage]
    path = options.results or (Path(os.environ["OUT"], "gpu.json") if os.environ.get("OUT") else RESULTS)
    known = read(path if options.results or path.exists() else RESULTS)
    parts, seconds = named(options.parts, stage.parts), options.seconds or stage.seconds
    if options.again:
        for part in parts:
            known.get("parts", {}).pop(part.name, None)
    return run(parts, known, path, seconds, stage.at_once, data=carried.unpack(Path(".gpu")))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="check and measure flowtrain on a GPU", prog="scripts/gpu")
    parser.add_argument("stage", nargs="?", metavar="|".join([*STAGES, "page"]))
    parser.add_argument("parts", nargs="*", metavar="part", help="only these parts")
    parser.add_argument("--results", type=Path, help="the JSON file (default: gpu.json in $OUT, else results/gpu.json)")
    parser.add_argument("--seconds", type=float, help="the time for the stage, in place of its own")
    parser.add_argument("--again", action="store_true", help="measure what the file has already once more")
    parser.add_argument("--rehearse", action="store_true", help="every part at a tiny size, on the CPU")
    parser.add_argument("--wheels", metavar="DIR", help="put the wheels that a machine without a registry needs here")
    parser.add_argument("--data", nargs=2, metavar=("DIR", "PACKED"), help="cut packed CIFAR-10 into DIR/a and DIR/b")
    options = parser.parse_args()
    if options.rehearse and options.stage:  # a part: a rehearsal runs all stages
        options.parts.insert(0, options.stage)
    elif options.stage not in (*STAGES, "page") and not (options.rehearse or options.wheels or options.data):
        parser.error(f"which stage? {', '.join(STAGES)} or page")
    return options


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
