"""Keep a `flowtrain bench` run in results/, a file for each processor, and write docs/: scripts/benchmarks.py RUN."""

import json
import re
import shutil
import sys
from pathlib import Path

import sections

from flowtrain.benchmarks import report
from flowtrain.runtime import files

run = Path(sys.argv[1])
found = json.loads((run / "bench.json").read_text())
slug = re.sub(r"[^a-z0-9]+", "_", found["processor"].lower()).strip("_")
files.write_json(Path(f"results/bench_{slug}.json"), found)
text = report.markdown([json.loads(path.read_text()) for path in sorted(Path("results").glob("bench_*.json"))])
if (run / "bench.png").is_file():
    shutil.copy(run / "bench.png", "docs/benchmarks.png")
    text += f"\n\n![the ratios on {found['processor']}, their spreads and what they are to reach](benchmarks.png)"
sections.write(Path("docs/benchmarks.md"), "run", text)
print(text)
