"""The tables of docs/gpu.md, from what scripts/gpu found."""

from __future__ import annotations

from pathlib import Path

import sections

from on_gpu.part import Part
from on_gpu.parts import STAGES

NOT_YET = "not measured yet"


def write(page: Path, found: dict) -> int:
    """Write the sections of the page."""
    for name, text in texts(found).items():
        sections.write(page, name, text)
    print(page)
    return 0


def texts(found: dict) -> dict[str, str]:
    """The text of each section: what was measured where, and the tables of the stages."""
    tables = {
        name: "\n\n".join(table(part, found.get("parts", {}).get(part.name, {})) for part in stage.parts)
        for name, stage in STAGES.items()
    }
    return {"measured": sentence(found), **tables}


def sentence(found: dict) -> str:
    """On which GPU, and when."""
    if "date" not in found:  # no row was measured, though parts may have been begun
        return "**No GPU was at hand so far: nothing below has been measured yet.**"
    rows = sum(len(part.rows) for stage in STAGES.values() for part in stage.parts)
    have = [one for figures in found["parts"].values() for one in figures.values()]
    done = sum("not_here" not in one and "failed" not in one for one in have)
    return f"{found['date']}: {found['device']}, torch {found['torch']}; {done} of {rows} rows measured."


def table(part: Part, found: dict) -> str:
    """A table of a part: every row that there is to measure."""
    head = [part.name, *part.columns]
    lines = [head, ["---"] * len(head), *([name, *cells(part, found.get(name))] for name in part.rows)]
    return "\n".join([part.title, "", *("| " + " | ".join(line) + " |" for line in lines)])


def cells(part: Part, figures: dict | None) -> list[str]:
    """The cells of a row."""
    if figures is None:
        text = NOT_YET
    elif "not_here" in figures:
        text = f"{NOT_YET}: {figures['not_here']}"
    elif "failed" in figures:
        text = f"**fails**: {figures['failed']}"
    else:
        return [column(figures) for column in part.columns.values()]
    return [" ".join(text.replace("|", "\\|").split()), *[""] * (len(part.columns) - 1)]
