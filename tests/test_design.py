"""The shape of the house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import flowtrain

SOURCE = Path(flowtrain.__file__).parent

ALLOWED = {  # part -> the parts of flowtrain that it may import
    "errors": set(),
    "tablefile": {"errors"},
    "files": {"errors"},
    "signals": {"errors"},
    "checked": set(),
    "fusion": set(),
    "globalbatch": set(),
    "distributed": {"errors"},
    "distributions": {"globalbatch"},
    "nets": {"fusion", "globalbatch"},
    "bijections": {"distributions", "fusion", "globalbatch"},
    "flow": {"bijections", "checked", "distributions", "fusion", "globalbatch"},
    "data": {"errors", "globalbatch", "tablefile"},
    "plots": {"errors", "files"},
    "engine": {
        "bijections", "data", "distributed", "errors", "files", "flow", "fusion", "globalbatch", "plots", "signals",
    },  # fmt: skip
    "benchmarks": {"assemble", "bijections", "config", "data", "engine", "errors", "flow"},
}
COMMANDS = {"train", "eval", "sample", "check", "score", "bench"}


def imports():
    """(file, part, imported part) for every import of flowtrain inside it."""
    for file in SOURCE.rglob("*.py"):
        part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flowtrain":
                names = [node.module] if node.module != "flowtrain" else [f"flowtrain.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "flowtrain"]
            for name in names:
                target = (name.split(".") + [""])[1]
                if (SOURCE / target).is_dir() or (SOURCE / f"{target}.py").is_file():
                    yield file.name, part, target


def test_imports_point_one_way():
    wrong = [
        f"{file}: {part} imports {target}"
        for file, part, target in imports()
        if part != target and (target in COMMANDS or target not in ALLOWED.get(part, {target}))
    ]
    assert not wrong


def test_there_are_imports_to_check():
    assert ("coupling.py", "bijections", "bijections") in set(imports())


def test_only_the_front_door_knows_hydra():
    knows = {
        file.relative_to(SOURCE).parts[0]
        for file in SOURCE.rglob("*.py")
        if "import hydra" in file.read_text() or "from hydra" in file.read_text() or "omegaconf" in file.read_text()
    }
    assert not knows & {*ALLOWED, *COMMANDS, "assemble.py", "train.py", "eval.py", "sample.py"}


def test_the_front_door_imports_no_torch():
    parts = ", ".join(f"flowtrain.{name}" for name in ("cli", "config", "distributed", "tablefile"))
    code = f"import sys, {parts}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
