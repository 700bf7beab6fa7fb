"""Write the table and the plot of a `flowtrain bench` run into docs/: scripts/benchmarks.py RUN."""

import json
import shutil
import sys
from pathlib import Path

import sections

from flowtrain.benchmarks import report

run = Path(sys.argv[1])
text = report.markdown(json.loads((run / "bench.json").read_text()))
if (run / "bench.png").is_file():
    shutil.copy(run / "bench.png", "docs/benchmarks.png")
    text += "\n\n![the measured ratios with their spreads, and the targets](benchmarks.png)"
sections.write(Path("docs/benchmarks.md"), "run", text)
print(text)
