"""Pages of the site that no one writes: made from conf/ and CONTRIBUTING.md each time the site is built."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from flowtrain.cli.help import ConfigFiles, Key, description, usage
from flowtrain.commands import COMMANDS
from flowtrain.config.compose import conf_dir

ROOT = Path(__file__).resolve().parent.parent
API = {  # page -> what it documents, beside the package of that name
    "flow": ["flowtrain.Flow"],
    "flows": [f"flowtrain.flows.{file.stem}" for file in sorted((ROOT / "flowtrain/flows").glob("[!_]*.py"))],
    "bijections": ["flowtrain.bijections.univariate.Univariate", "flowtrain.bijections.coupling.Partition"],
    "nets": ["flowtrain.nets"],
    "distributions": ["flowtrain.distributions"],
    "load": ["flowtrain.load"],
    "scores": [f"flowtrain.scores.{name}" for name in ("conformal", "typicality", "chain_rule")],
    "fit": ["flowtrain.fit", "flowtrain.inference.fit.Fitted", "flowtrain.DensityEstimator"],
    "sbi": ["flowtrain.inference.sbi"],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files of the repository that pages link to."""
    pages = {
        "commands.md": commands_page(),
        "configuration.md": configuration_page(),
        "experiments.md": experiments_page(),
        "contributing.md": contributing_page(),
        **{f"api/{name}.md": api_page(name, of) for name, of in API.items()},
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for page in Path(config.docs_dir).rglob("*.md"):
        for path in outside(page.read_text()):
            if (
                path != "CONTRIBUTING.md"
                and (ROOT / path).is_file()
                and not files.get_file_from_path(f"repository/{path}")
            ):
                files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their copies in the site; a folder has none. Names of classes become
    links to the API."""
    markdown = markdown.replace("](../CONTRIBUTING.md", "](contributing.md")
    if not page.file.src_uri.startswith("api/"):
        names = r"`((?:bijections|flows|nets|distributions)\.[A-Z]\w+)`"
        markdown = re.sub(names, r"[`\1`][flowtrain.\1]", markdown)
    for path in outside(markdown):
        name = re.escape(f"../{path}")
        if (ROOT / path).is_file():
            markdown = re.sub(rf"\]\({name}\)", f"](repository/{path})", markdown)
        else:
            markdown = re.sub(rf"\[([^]]*)\]\({name}\)", r"\1", markdown)
    return markdown


def outside(markdown: str) -> set[str]:
    """The files and folders outside docs/ that a page of docs/ links to."""
    return set(re.findall(r"\]\(\.\./([^)#]+)\)", markdown))


def commands_page() -> str:
    """A section for each command: what it does, examples, its keys and its groups."""
    found = ["# Commands", "`flowtrain COMMAND --help` prints the same.", ""]
    found += [f"- [`flowtrain {name}`](#flowtrain-{name}): {command.summary}" for name, command in COMMANDS.items()]
    found += ["- `flowtrain completion`: [tab completion](install.md#completion)"]
    for name, command in COMMANDS.items():
        files = ConfigFiles([conf_dir()], {})
        file = conf_dir() / f"{name}.yaml"
        found += ["", f"## flowtrain {name}", "", *prose(file), f"```text\nflowtrain {name} {usage(command)}\n```", ""]
        found += table(files.keys(file))
        chosen = files.chosen(files.with_includes(file))
        links = [f"[`{group}`](configuration.md#{group})" for group in chosen if group not in ("ckpt", "experiment")]
        if links:
            found += ["", f"Groups: {', '.join(links)}."]
    return "\n".join(found) + "\n"


def configuration_page() -> str:
    """A section for each group: its options, and the keys of each option."""
    files = ConfigFiles([conf_dir()], {})
    defaults = files.chosen(files.with_includes(conf_dir() / "train.yaml"))
    found = ["# Groups and keys", "`GROUP=OPTION` chooses an option; `GROUP.KEY=VALUE` sets one of its keys."]
    found += [
        "The keys of a run itself, such as `max_steps`, are with [the commands](commands.md#flowtrain-train).",
        "",
    ]
    for group in files.groups():
        if group == "experiment":
            continue
        links = ", ".join(f"[`{option}`](#{group}{option})" for option in files.options(group))
        default = f" The default is `{defaults[group]}`." if defaults.get(group) else ""
        found += [f"## {group}", "", f"`{group}=` {links}.{default}", ""]
        for option in files.options(group):
            file = files.find(group, option)
            found += [f"### {group}={option}", "", *prose(file), *table(files.keys(file, f"{group}.")), ""]
            parts = {name: of for name, of in files.chosen(files.with_includes(file)).items() if name != group}
            if parts:
                links = ", ".join(f"[`{name}={of}`](configuration.md#{name}{of})" for name, of in parts.items())
                found += [f"It chooses {links}.", ""]
    return "\n".join(found) + "\n"


def experiments_page() -> str:
    """A section for each experiment: what it sets."""
    files = ConfigFiles([conf_dir()], {})
    found = ["# Experiments", "`experiment=NAME` sets a paper's model, data and training, or settings for a small"]
    found += ["machine. What follows is each file; [presets](presets.md) compares them with the papers.", ""]
    for option in files.options("experiment"):
        file = files.find("experiment", option)
        lines = file.read_text().splitlines()
        body = "\n".join(line for line in lines if not line.startswith("#"))
        found += [f"## {option}", "", *prose(file), f"```yaml\n{body.strip()}\n```", ""]
    return "\n".join(found) + "\n"


def contributing_page() -> str:
    """CONTRIBUTING.md, whose links start at the root of the repository."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.sub(r"\]\(docs/", "](", text).replace("# Contributing", "# Your own parts", 1)


def api_page(title: str, names: list[str]) -> str:
    found = [f"# {title}", *(f"::: {name}" for name in names)]
    if title == "flows":  # whose functions have the names of their modules, which hide them
        found.insert(1, "::: flowtrain.flows\n    options: {members: false}")
    if title == "bijections":
        found.insert(1, "::: flowtrain.bijections")
    return "\n\n".join(found) + "\n"


def prose(file: Path) -> list[str]:
    """A file's first comment: its sentences, and its indented lines of examples as a block of code."""
    found, examples = [], []
    for line in [*description(file).splitlines(), ""]:
        if line.startswith("  "):
            examples.append(line.strip())
        else:
            found += [*_block(examples), escape(line)]
            examples = []
    return [*found, ""]


def _block(examples: list[str]) -> list[str]:
    return ["", "```text", *examples, "```", ""] if examples else []


def table(keys: list[Key]) -> list[str]:
    """Names, default values, comments."""
    if not keys:
        return []
    rows = [f"| `{key.name}` | {f'`{cell(key.value)}`' if key.value else ''} | {escape(key.comment)} |" for key in keys]
    return ["| key | default | meaning |", "| --- | --- | --- |", *rows]


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def escape(text: str) -> str:
    """Text that Markdown must not take for anything else."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
