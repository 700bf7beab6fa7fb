"""Sheets of .xlsx files, read as the text of their cells."""

from __future__ import annotations

import csv
import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flowtrain.data.tables.block import join_names, nearest
from flowtrain.data.tables.text_file import TextFile
from flowtrain.errors import FlowtrainError, UsageError

LARGEST = 2**28  # bytes of a file once unpacked: in memory its cells take about six times that
MOST_ROWS = 2**20  # of Excel's sheets
MOST_CELLS = 2**26


class Excel(TextFile):
    """A sheet of an .xlsx file, the first one unless ``read`` has a ``sheet_name``. Times are texts in ISO 8601."""

    def __init__(self, path: Path, read: Mapping, text: Sequence[str]):
        import openpyxl

        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST:
            raise UsageError(
                f"{path} has {size / 2**20:,.0f} MB of XML, more than {LARGEST / 2**20:.0f} MB; save it as .csv"
            )
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            book = openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)
            sheets = [sheet.title for sheet in book.worksheets]
            if not sheets:
                raise FlowtrainError(f"cannot read {path}: it holds no sheet")
            sheet = _choose(sheets, read.get("sheet_name", 0))
            rows = [row for row in _rows(book[sheet]) if any(row)]
        used = sorted({place for row in rows for place, text in enumerate(row) if text})
        if len(rows) * len(used) > MOST_CELLS:
            raise UsageError(
                f"{path}: {len(rows):,} rows of {len(used):,} columns are more than {MOST_CELLS:,} cells; save it as"
                " .csv"
            )
        text_of_cells = io.StringIO()
        writer = csv.writer(text_of_cells, lineterminator="\n")
        writer.writerows([row[place] if place < len(row) else "" for place in used] for row in rows)
        self._text = text_of_cells.getvalue().encode(errors="surrogatepass")
        super().__init__(path, {"sep": ","} | {key: value for key, value in read.items() if key != "sheet_name"}, text)
        if len(sheets) > 1 and "sheet_name" not in read:
            self.notes.append(f"the sheet is '{sheet}'; dataset.read={{sheet_name: …}} chooses of {join_names(sheets)}")

    def _warn_if_cut(self):
        pass

    def _pieces(self):
        yield self._text


def _rows(sheet) -> Iterator[list[str]]:
    """The texts of a sheet's cells, row by row, without empty ones at the end."""
    sheet.reset_dimensions()  # which a file may state wrongly
    for number, cells in enumerate(sheet.iter_rows()):
        if number == MOST_ROWS:
            raise UsageError(f"sheet '{sheet.title}' has more than {MOST_ROWS:,} rows")
        texts = [_text(cell) for cell in cells]
        while texts and not texts[-1]:
            texts.pop()
        yield texts


def _text(cell) -> str:
    """A cell as text, empty if it has no value or an error such as #N/A."""
    value = cell.value
    if value is None or cell.data_type == "e":
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _choose(sheets: list[str], wanted) -> str:
    """The name of a sheet that is given by its name or number."""
    if wanted in sheets:
        return wanted
    if isinstance(wanted, int) and 0 <= wanted < len(sheets):
        return sheets[wanted]
    near = nearest(str(wanted), sheets)
    hint = f"did you mean '{near}'?" if near else f"there are {join_names(sheets)}"
    raise UsageError(f"dataset.read.sheet_name={wanted}: there is no such sheet; {hint}")
