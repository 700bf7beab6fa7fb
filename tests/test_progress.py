"""Progress on a terminal of any width, in a log file and in a notebook."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import pytest

from flowtrain.engine.budget import Budget
from flowtrain.engine.loggers import ProgressBar, ProgressLines, RunRecord, progress
from flowtrain.engine.loggers.terminal import fit

ROOT = Path(__file__).resolve().parent.parent


def record(steps=100_000, minutes=None, examples="images") -> RunRecord:
    return RunRecord(Path(), 0, 0, Budget(steps, minutes), "bits_per_dim", "bits/dim", {}, examples)


def report(seconds=10.0, figure=2.5, rate=12345.6) -> dict:
    values = {"train/bits_per_dim": figure, "system/seconds": seconds}
    return values | {"system/images_per_second": rate, "system/rows_per_second": rate}


def on_terminal(columns: int, code: str, folder) -> str:
    """All that a process writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    env.pop("COLUMNS", None)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the terminal has gone
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


BAR = """
import logging, sys
from pathlib import Path
from flowtrain.engine.budget import Budget
from flowtrain.engine.loggers import RunRecord, progress
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
bar = progress()
bar.open(RunRecord(Path(), 0, 0, Budget(100_000, None), "bits_per_dim", "bits/dim", {}, "images"))
for step in range(10_000, 110_000, 10_000):
    values = {"train/bits_per_dim": 12.34567, "system/seconds": step * 0.5, "system/images_per_second": 12345.6}
    bar.scalars(step, values)
    bar.bar.refresh()
    if step == 50_000:
        logging.getLogger("flowtrain").info("step 50000: validation 2.5 bits/dim")
bar.close()
"""


def test_a_bar_fits_its_terminal(tmp_path):
    for columns in (40, 80):
        shown = on_terminal(columns, BAR, tmp_path)
        parts = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", part).rstrip("\n") for part in re.split(r"[\r\n]+", shown)]
        bars = [part.rstrip() for part in parts if "bits/dim" in part and "validation" not in part]
        assert bars and all(len(part) <= columns - 1 for part in parts), columns
        assert all("12.3457 bits/dim" in part and " left" in part for part in bars)
        assert all(("12346 images/s" in part) == (columns >= 80) for part in bars)
        assert any("━" in part for part in bars) == (columns >= 80)
        assert bars[0].startswith(" 10%") and bars[-1].startswith("100%") and "12:30:00 left" in bars[0]
        assert any(part == "step 50000: validation 2.5 bits/dim" for part in parts)


def test_a_line_is_never_too_long_and_loses_the_least():
    for width in range(1, 130):
        line = fit(0.123, "12345/99999", "-12345.6789 nats", "123456 rows/s", "123:45:06 left", width)
        assert len(line) <= width
        assert ("left" in line) == (width >= 31) and ("rows/s" in line) == (width >= 52)
        assert ("12345/" in line) == (width >= 65) and ("─" in line) == (width >= 76)


def test_a_log_file_gets_a_line_now_and_then(caplog):
    def steps(budget_minutes, seconds_a_step, every=10, until=1000):
        caplog.clear()
        lines = ProgressLines()
        lines.open(record(None if budget_minutes else until, budget_minutes))
        with caplog.at_level("INFO", logger="flowtrain"):
            for step in range(every, until + 1, every):
                lines.scalars(step, report(step * seconds_a_step))
        return [int(re.match(r"step (\d+): ", message)[1]) for message in caplog.messages]

    assert steps(None, 0.01) == [10, *range(50, 1001, 50)]  # ten seconds: each twentieth
    hour = steps(None, 30.0, every=1, until=100)  # a line each minute
    assert hour[0] == 1 and hour[-1] == 100 and max(b - a for a, b in zip(hour, hour[1:])) == 2
    assert "12346 images/s, 0:00 left" in caplog.messages[-1]


def test_what_shows_progress(monkeypatch):
    class Terminal:
        def __init__(self, yes):
            self.isatty = lambda: yes

    monkeypatch.setattr(sys, "stderr", Terminal(False))
    assert type(progress()) is ProgressLines
    monkeypatch.setattr(sys, "stderr", Terminal(True))
    assert type(progress()) is ProgressBar
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    kernel = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    assert type(progress()) is ProgressBar
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: object()))
    assert type(progress()) is ProgressLines


def test_a_notebook_gets_a_line_of_79_characters_that_is_written_over(monkeypatch):
    class Output:  # of a kernel: no file number
        def __init__(self):
            self.text, self.encoding = "", "utf-8"

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return False

    output = Output()
    monkeypatch.setattr(sys, "stderr", output)
    bar = ProgressBar()
    bar.open(record(100))
    for step in (10, 50, 100):
        bar.scalars(step, report(float(step)))
        bar.bar.refresh()
    bar.close()
    parts = re.split(r"[\r\n]+", output.text)
    assert max(map(len, parts)) == 79 and any(part.startswith(" 50%") and "0:50 left" in part for part in parts)
    assert output.text.count("\n") == 1 and logging.getLogger("flowtrain") is not None


@pytest.mark.slow
def test_a_run_on_a_terminal_of_80_columns(tmp_path):
    code = "from flowtrain.cli.main import main; import sys; sys.argv[1:] = {}; main()"
    words = ["train", "model=nice", "logger=none", "max_steps=200", "trainer.log_every=5", "trainer.val_examples=20"]
    shown = on_terminal(80, code.format(words), tmp_path)
    bars = [part for part in re.split(r"[\r\n]+", shown) if "━" in part and "left" in part]
    assert len(bars) > 1 and all(
        len(part.rstrip()) <= 79 and "bits/dim" in part and "images/s" in part for part in bars
    )
    log = next(tmp_path.glob("outputs/*/*/train.log")).read_text()
    assert "\r" not in log and "━" not in log
