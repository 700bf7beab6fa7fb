"""Every script of examples/ runs as it stands, in an empty folder, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SAYS = {  # script -> lines of its output, as patterns
    "anomaly_scores": [
        r"^2,000 calibration rows: 0\.05 to 0\.44 % of usual rows",
        r"^row 10: .*least likely: temperature; outside: none$",
        r"^row 20: .*least likely: vibration",
        r"^row 30: .*outside: load",
    ],
    "sbi": [
        r"^mean: 0\.[34]\d 0\.[67]\d, exact 0\.39 0\.74$",
        r"^deviation: 0\.(2|3)\d 0\.(2|3)\d, exact 0\.29 0\.29$",
        r"^coverage: p = 0\.[^0]",
    ],
    "variational": [
        r"^log Z: 10\.\d+ ± 0\.\d+, exact 10\.293$",
        r"^effective sample size: \d\d\.\d %$",
        r"^modes found: 2 of 2$",
    ],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs(script, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    assert done.stdout.strip() and not done.stderr, done.stderr
    for pattern in SAYS.get(script.stem, ()):
        assert re.search(pattern, done.stdout, re.M), f"{pattern}\n{done.stdout}"


def test_each_promise_belongs_to_a_script():
    assert {*SAYS} <= {script.stem for script in SCRIPTS}
