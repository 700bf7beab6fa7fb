"""Pages with sections that scripts write: between <!-- name: … --> and <!-- /name -->."""

import re
from pathlib import Path


def write(page: Path, name: str, text: str) -> None:
    """Replace the text of a section. Raises ValueError if the page does not have exactly one of that name."""
    marked = re.compile(rf"(<!-- {name}:.*?-->\n).*?(<!-- /{name} -->)", re.S)
    written, found = marked.subn(lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text())
    if found != 1:
        raise ValueError(f"{page} has {found} sections {name}")
    page.write_text(written)
