"""Write outputs/reliability.json, from `scripts/test --reliability`, as the table of docs/reliability.md."""

import json
from pathlib import Path

import sections


def escape(text: str) -> str:
    """The text of a cell of a Markdown table."""
    return text.replace("|", r"\|")


found = json.loads(Path("outputs/reliability.json").read_text())
lines = [
    f"{found['date']}: torch {found['torch']}, {found['cores']} cores, {found['seconds'] / 60:.0f} minutes.",
    "",
    "| promise | asked | seen |",
    "|---|---|---|",
    *(f"| {number} | {escape(asked)} | {escape(seen)} |" for number, asked, seen in found["promises"]),
]
sections.write(Path("docs/reliability.md"), "seen", "\n".join(lines))
