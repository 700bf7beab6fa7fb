"""The documentation as a site: it builds without a warning, its links lead somewhere, and it names every key."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from omegaconf import OmegaConf

from flowtrain.commands import COMMANDS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return folder


class Page(HTMLParser):
    """The anchors of a page, what it loads, and what it links to."""

    def __init__(self, file: Path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif attributes.get("src") or tag == "link":
            self.loads.append(attributes.get("src") or attributes["href"])


@pytest.mark.slow
def test_no_page_asks_another_host_for_anything(site):
    pages = [Page(file) for file in site.rglob("*.html")]
    assert len(pages) > 20
    loads = {address for page in pages for address in page.loads}
    assert loads and not any(re.match(r"(https?:)?//", address) for address in loads)
    styles = [file.read_text() for file in site.rglob("*.css")]
    assert styles and not any(re.search(r"url\(\s*['\"]?https?:|@import", text) for text in styles)


@pytest.mark.slow
def test_every_link_leads_somewhere(site):
    pages = {file: Page(file) for file in site.rglob("*.html")}
    dead = []
    for file, page in pages.items():
        for link in page.links:
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"\w+:", path):
                continue
            target = (site / path[1:] if path.startswith("/") else file.parent / path).resolve() if path else file
            if not target.exists() or anchor and target in pages and anchor not in pages[target].anchors:
                dead.append(f"{file.relative_to(site)}: {link}")
    assert not dead


@pytest.mark.slow
def test_every_command_and_key_is_on_its_page(site):
    commands, groups = ((site / f"{name}.html").read_text() for name in ("commands", "configuration"))
    for name in COMMANDS:
        start = commands.index(f'id="flowtrain-{name}"')
        section = commands[start : commands.find("<h2", start)]
        listed = re.findall(r"<td><code>([\w.]+)</code></td>", section)
        assert {key.split(".")[0] for key in listed} >= scalars(ROOT / "conf" / f"{name}.yaml"), name
    listed = set(re.findall(r"<td><code>([\w.]+)</code></td>", groups))
    for file in (ROOT / "conf").glob("*/[!_]*.yaml"):
        group, option = file.parent.name, file.stem
        if group not in ("experiment", "hydra"):
            assert f'id="{group}{option}"' in groups, file
            assert {f"{group}.{key}" for key in scalars(file)} - {f"{group}.layers"} <= listed | {f"{group}.hydra"}, (
                file
            )


def scalars(file: Path) -> set[str]:
    """The keys of a file whose values a user may set: none that Hydra reads, that is computed, or that is a mapping."""
    tree = OmegaConf.load(file)
    keys = [key for key in tree if not key.startswith("_") and key not in ("defaults", "hydra")]
    return {key for key in keys if not OmegaConf.is_interpolation(tree, key) and not OmegaConf.is_config(tree[key])}


def pages_of(nav: list) -> list[str]:
    found = []
    for entry in nav:
        (target,) = entry.values()
        found += pages_of(target) if isinstance(target, list) else [target]
    return found


def test_the_navigation_has_every_page():
    settings = re.sub(r"!!python/\S+ \{.*\}", "x}", (ROOT / "mkdocs.yml").read_text())
    listed = pages_of(yaml.safe_load(settings)["nav"])
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed)) and pages <= set(listed)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_at_the_root_lead_somewhere(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"`(docs/[\w./]+)`", text)
    for link in links:
        path, _, anchor = link.partition("#")
        if not re.match(r"\w+:", link):
            assert (ROOT / path).exists(), link
            assert not anchor or anchor in slugs((ROOT / (path or name)).read_text()), link


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings."""
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}


def test_the_tables_of_costs_are_those_that_were_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import choosing

    found = json.loads((ROOT / "docs" / "choosing.json").read_text())
    assert {*found["sizes"]} == {*choosing.SIZES} and choosing.tables(found) in (
        ROOT / "docs" / "choosing.md"
    ).read_text()
    for size, (_, _, _, models) in choosing.SIZES.items():
        assert [row["model"] for row in found["sizes"][size]] == [*models]
