"""``flowtrain completion``: real shells, in a terminal, complete what is typed."""

import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from inprocess import flowtrain

from flowtrain.cli.completion import SCRIPTS
from flowtrain.errors import UsageError

ROOT = Path(__file__).parent.parent
SHELLS = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"], "fish": ["fish", "--no-config", "-i"]}
RUN = "outputs/moons-maf/2026-01-02_00-00-00"
TYPED = [  # what is typed, then what the line must show
    ("flowtrain ev\t", "flowtrain eval "),
    ("ckpt=outputs/mo\t", f"ckpt={RUN}"),
    ("\x15flowtrain train model=glow_\t", "model=glow_vector"),
    ("optimizer.weight\t", "optimizer.weight_decay="),
    ("\x15flowtrain compl\t", "flowtrain completion"),
]


class Terminal:
    """A shell in a terminal, in ``folder``."""

    def __init__(self, words: list[str], folder: Path, env: dict):
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.execvpe(words[0], words, env)

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """Read until the screen shows ``text`` and then nothing more; what it showed."""
        seen, end = "", time.monotonic() + seconds
        while time.monotonic() < end:
            ready, _, _ = select.select([self.file], [], [], 0.3)
            if ready:
                seen += os.read(self.file, 65536).decode(errors="replace")
            elif text in plain(seen):
                break
        return plain(seen)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.file)


def plain(text: str) -> str:
    """What a terminal showed, without the codes for colours and places."""
    return re.sub(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|\([A-Z])|.\x08|[\x07\x08\r\n]", "", text)


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here")
    program = tmp_path / "bin" / "flowtrain"
    program.parent.mkdir()
    program.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -m flowtrain "$@"\n')
    program.chmod(0o755)
    (tmp_path / RUN / "checkpoints").mkdir(parents=True)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "TERM": "xterm", "HOME": str(tmp_path), "COLUMNS": "200"}
    line = next(text for text in installed_by() if f"completion {shell}" in text)
    terminal = Terminal(SHELLS[shell], tmp_path, env)
    try:
        terminal.type(line + "; echo rea''dy\r")
        assert "ready" in terminal.wait_for("ready")
        for typed, shows in TYPED:
            terminal.type(typed)
            assert shows in terminal.wait_for(shows), typed
    finally:
        terminal.close()


def installed_by() -> list[str]:
    """The lines that docs/install.md tells to put into the shells' files."""
    return re.findall(r"`([^`]*flowtrain completion [a-z][^`]*)`", (ROOT / "docs" / "install.md").read_text())


def test_each_shell_has_its_line():
    assert len(installed_by()) == len(SCRIPTS) == len(SHELLS)


def test_the_command_says_how_it_is_used(tmp_path, capsys):
    assert flowtrain(tmp_path, "completion") == 0
    said = capsys.readouterr().out
    assert all(line in said for line in installed_by())
    with pytest.raises(UsageError, match="give one of bash, zsh, fish"):
        flowtrain(tmp_path, "completion", "tcsh")
    with pytest.raises(UsageError, match="did you mean 'completion'"):
        flowtrain(tmp_path, "completon")


def test_it_offers_commands_shells_and_runs(tmp_path, capsys, monkeypatch):
    def complete(line):
        monkeypatch.setenv("COMP_LINE", line)
        flowtrain(tmp_path, "-sc", "query=bash")
        return capsys.readouterr().out.split()

    for name in ("2026-01-02_00-00-00", "2026-01-03_00-00-00"):
        (tmp_path / "outputs" / "moons-maf" / name / "checkpoints").mkdir(parents=True)
    assert {"train", "eval", "completion"} <= set(complete("flowtrain "))
    assert complete("flowtrain completion ") == ["bash", "zsh", "fish"]
    runs = ["ckpt=outputs/moons-maf/2026-01-03_00-00-00", "ckpt=outputs/moons-maf/2026-01-02_00-00-00"]
    assert complete("flowtrain eval ckpt=") == runs  # the newest first
    assert complete(f"flowtrain eval {runs[1]}/") == [f"{runs[1]}/checkpoints/"]
    assert complete("flowtrain sample outputs/mo") == ["outputs/moons-maf/"]
    assert {"dataset=moons", "dataset=mnist"} <= set(complete("flowtrain train dataset=m"))
    assert complete("flowtrain train trainer.cl") == ["trainer.clip="]
