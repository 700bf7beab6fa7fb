"""scalars.csv, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from flowtrain.engine.loggers.logger import NullLogger
from flowtrain.runtime import files


class CsvTable(NullLogger):
    """Writes scalars.csv: a row for each step, a column for each scalar.

    A scalar that appears later adds a column, which is empty in the rows above. A resumed run continues the table:
    rows beyond its step, and one that a kill left half-written, are cut.
    """

    def open(self, run):
        self.path: Path = run.directory / "scalars.csv"
        self.columns, rows = _read(self.path, run.step)
        self._write_all(rows)
        self.last = rows[-1] if rows else {}

    def scalars(self, step, values):
        new = self.last.get("step") != str(step)
        row = {"step": str(step)} if new else self.last
        row |= {name: repr(float(value)) for name, value in values.items()}
        if row.keys() <= {*self.columns}:
            self._write_row(row, new)
        else:
            _, rows = _read(self.path, step - 1)
            self.columns += [name for name in row if name not in self.columns]
            self._write_all([*rows, row])
        self.last = row

    def _write_row(self, row: dict[str, str], new: bool) -> None:
        """Append a row; or write it over the last one, of which it has all cells and more."""
        data = _format([row.get(name, "") for name in self.columns])
        with files.convert_errors(self.path, len(data)), self.path.open("r+b", buffering=0) as file:
            if new:
                self.start = file.seek(0, io.SEEK_END)
                files.append(file, data)
            else:
                file.seek(self.start)
                file.write(data)
                file.truncate()

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        lines = [_format(self.columns), *(_format([row.get(name, "") for name in self.columns]) for row in rows)]
        files.write(self.path, b"".join(lines))
        self.start = sum(map(len, lines[:-1]))  # where the last row begins


def _format(cells: list[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _read(path: Path, step: int) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a table and its rows up to ``step``, without empty cells."""
    if not path.exists():
        return ["step"], []
    whole = path.read_text(errors="replace").rpartition("\n")[0]
    columns, *rows = [*csv.reader(io.StringIO(whole))] or [["step"]]
    kept = [row for row in rows if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= step]
    return columns, [{name: cell for name, cell in zip(columns, row) if cell} for row in kept]
