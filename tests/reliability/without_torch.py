"""Run commands in a process that cannot import torch: ``python without_torch.py < JSON``.

Reads a list of lists of words, writes a list of [exit code, message].
"""

import json
import sys

sys.modules["torch"] = None  # import torch is now an error

sys.argv = ["flowtrain"]
from inprocess import flowtrain  # noqa: E402

from flowtrain.cli import exit_codes  # noqa: E402

out = []
for words in json.load(sys.stdin):
    try:
        out.append([flowtrain(".", *words), ""])
    except Exception as error:
        out.append(exit_codes.describe_error(error)[::-1])
print("\n" + json.dumps(out))
