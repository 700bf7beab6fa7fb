"""Pages whose sections, between <!-- name: … --> and <!-- /name -->, scripts write."""

import re
from pathlib import Path


def write(page: Path, name: str, text: str) -> None:
    """Replace the text of a section.

    Raises:
        ValueError: the page does not have exactly one section of that name.
    """
    section = re.compile(rf"(<!-- {name}:.*?-->\n).*?(<!-- /{name} -->)", re.S)
    new, found = section.subn(lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text())
    if found != 1:
        raise ValueError(f"{page} has {found} sections {name}")
    page.write_text(new)
