"""Write outputs/reliability.json, which `scripts/test --reliability` leaves, into docs/reliability.md."""

import json
from pathlib import Path

import sections


def cell(text: str) -> str:
    return text.replace("|", r"\|")


found = json.loads(Path("outputs/reliability.json").read_text())
lines = [
    f"{found['date']}: torch {found['torch']}, {found['cores']} cores, {found['seconds'] / 60:.0f} minutes.",
    "",
    "| promise | asked | seen |",
    "|---|---|---|",
    *(f"| {number} | {cell(asked)} | {cell(seen)} |" for number, asked, seen in found["promises"]),
]
sections.write(Path("docs/reliability.md"), "seen", "\n".join(lines))
