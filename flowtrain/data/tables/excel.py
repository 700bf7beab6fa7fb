"""Sheets of .xlsx files, read as the text of their cells."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowtrain.data.tables.block import join_names, nearest
from flowtrain.data.tables.text_file import TextFile
from flowtrain.errors import FlowtrainError, UsageError


class Excel(TextFile):
    """A sheet of an .xlsx file, the first one unless ``read`` has a ``sheet_name``. Times are texts in ISO 8601."""

    def __init__(self, path: Path, read: Mapping, text: Sequence[str]):
        import pandas as pd

        with warnings.catch_warnings(action="ignore"), pd.ExcelFile(path, engine="openpyxl") as book:
            sheets = book.sheet_names
            if not sheets:
                raise FlowtrainError(f"cannot read {path}: it holds no sheet")
            sheet = _choose(sheets, read.get("sheet_name", 0))
            frame = pd.read_excel(book, sheet, header=None, dtype=object, na_filter=False)
        used = frame.ne("")
        frame = frame.loc[used.any(axis=1), used.any(axis=0)]
        text_of_cells = io.StringIO()
        csv.writer(text_of_cells, lineterminator="\n").writerows(frame.itertuples(index=False))
        self._text = text_of_cells.getvalue().encode()
        super().__init__(path, {"sep": ","} | {key: value for key, value in read.items() if key != "sheet_name"}, text)
        if len(sheets) > 1 and "sheet_name" not in read:
            self.notes.append(f"the sheet is '{sheet}'; dataset.read={{sheet_name: …}} chooses of {join_names(sheets)}")

    def _warn_if_cut(self):
        pass

    def _pieces(self):
        yield self._text


def _choose(sheets: list[str], wanted) -> str:
    """The name of a sheet that is given by its name or number."""
    if wanted in sheets:
        return wanted
    if isinstance(wanted, int) and 0 <= wanted < len(sheets):
        return sheets[wanted]
    near = nearest(str(wanted), sheets)
    hint = f"did you mean '{near}'?" if near else f"there are {join_names(sheets)}"
    raise UsageError(f"dataset.read.sheet_name={wanted}: there is no such sheet; {hint}")
