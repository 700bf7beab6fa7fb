"""The architecture, as a table: each part, and the parts of flowtrain that it may import. Total: nothing is exempt."""

import ast
import subprocess
import sys
from pathlib import Path

import flowtrain

SOURCE = Path(flowtrain.__file__).parent

PARTS = {  # a package or a module -> what it may import beside itself
    "errors": set(),
    "runtime": {"errors"},
    "distributions": {"runtime"},
    "nets": {"runtime"},
    "bijections": {"runtime"},
    "flow_distribution": {"runtime"},
    "embedding": {"bijections"},
    "flow": {"runtime", "bijections", "distributions", "embedding", "flow_distribution"},
    "flows": {"flow", "embedding", "bijections", "nets", "distributions"},
    "data": {"errors", "runtime"},
    "targets": {"errors"},
    "plots": {"errors", "runtime"},
    "engine": {"errors", "runtime", "bijections", "distributions", "flow", "data", "plots", "targets"},
    "scores": {"bijections", "distributions", "flow"},
    "report": {"errors", "runtime"},
    "config": {"errors", "runtime", "flow", "flows", "data"},
    "export": {"errors", "runtime", "bijections", "flow", "data"},
    "importers": {"errors"},
    "commands": {
        "errors",
        "runtime",
        "bijections",
        "distributions",
        "flow",
        "data",
        "targets",
        "plots",
        "engine",
        "config",
        "benchmarks",
        "report",
        "export",
        "importers",
        "scores",
    },
    "training": {
        "errors",
        "runtime",
        "bijections",
        "flow",
        "data",
        "engine",
        "config",
        "commands",
        "targets",
        "benchmarks",
    },
    "inference": {
        "errors",
        "runtime",
        "bijections",
        "distributions",
        "flow",
        "flows",
        "data",
        "engine",
        "config",
        "commands",
        "training",
    },
    "train": {"runtime", "engine", "config", "training"},
    "rerun": {"runtime", "config", "commands", "training", "train"},
    "benchmarks": {"errors", "runtime", "bijections", "flow", "flows", "data", "engine"},
    "cli": {"errors", "runtime", "config", "commands", "plots"},
    "__init__": {"flow", "flow_distribution", "flows", "bijections", "nets", "distributions", "config", "inference"},
    "__main__": {"cli"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without "flowtrain."."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        names = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" and len(names) > 1 else names)] = file
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of flowtrain that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative imports hide what they name"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            continue
        for target in full:
            head, *rest = target.split(".")
            if head != "flowtrain":
                continue
            while rest and ".".join(rest) not in MODULES:  # the name of something in a module
                rest.pop()
            if rest:
                found.add(".".join(rest))
    return found - {name}


def part(module: str) -> str:
    return module.split(".")[0]


def test_every_module_belongs_to_a_part():
    assert {part(name) for name in MODULES} == {*PARTS}


def test_imports_point_one_way():
    wrong = [
        f"{name} imports {target}"
        for name in MODULES
        for target in imports(name)
        if part(target) != part(name) and part(target) not in PARTS[part(name)]
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    graph, done = {name: imports(name) for name in MODULES}, set()

    def visit(name: str, path: tuple) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_there_are_imports_to_check():
    assert "bijections.univariate" in imports("bijections.coupling")


def test_only_the_configuration_knows_hydra():
    words = ("import hydra", "from hydra", "from omegaconf")
    knows = {part(name) for name, file in MODULES.items() if any(word in file.read_text() for word in words)}
    assert knows <= {"cli", "config"}


def test_the_command_line_imports_no_torch():
    names = [name for name in MODULES if part(name) == "cli" and name not in ("cli.worker",)]
    code = f"import sys, {', '.join(f'flowtrain.{name}' for name in names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
