"""metrics.jsonl, which resumed runs continue and reports read."""

from __future__ import annotations

import json
from pathlib import Path

from flowtrain.engine.loggers.logger import NullLogger
from flowtrain.runtime import files


class JsonLines(NullLogger):
    """Writes metrics.jsonl: one object a line, with ``step`` and the scalars."""

    def open(self, run):
        path = run.directory / "metrics.jsonl"
        _cut(path, run.step, run.records)
        with files.convert_errors(path):
            self.file = path.open("ab", buffering=0)

    def scalars(self, step, values):
        files.append(self.file, (json.dumps({"step": step, **values}) + "\n").encode())

    def close(self):
        self.file.close()


def _cut(path: Path, step: int, count: int) -> None:
    """Drop the lines after the first ``count`` or beyond ``step``, and one that a kill left half-written."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(errors="replace").splitlines()[:count]:
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except ValueError:
            continue
    files.write(path, "".join(lines).encode())
