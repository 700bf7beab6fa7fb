"""Classes of examples: their names in order, and labels as the context of a flow."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flowtrain.errors import UsageError


def printable(name: str) -> str:
    """A file's name with each byte that is not UTF-8 as ``\\\\xff``, so that every file and terminal takes it.

    >>> printable("caf" + chr(0xDCE9))
    'caf\\\\xe9'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Different names in order: of numbers if all are whole numbers, else of letters.

    Raises:
        UsageError: a name that a configuration would not keep as it is.
    """
    found = {*names}
    for name in found:
        if "${" in name or name == "???":
            raise UsageError(f"the class {name}: rename it; a configuration reads this as a reference")
    whole = all(name.removeprefix("-").isdecimal() for name in found)
    return tuple(sorted(found, key=int if whole else None))


def number_classes(labels: Sequence[str], classes: Sequence[str], where: str) -> Tensor:
    """The number of each label's class, int64 (N,). Raises UsageError for a label that is none of ``classes``."""
    numbers = {name: number for number, name in enumerate(classes)}
    for label in {*labels} - numbers.keys():
        raise UsageError(f"{where}: the class {label} is none of {list_classes(classes)}")
    return torch.tensor([numbers[label] for label in labels], dtype=torch.int64)


def class_number(label: int | str, count: int, names: Sequence[str] = ()) -> int:
    """The number of the class that a user calls ``label``: its name, or its number from 0. Raises UsageError."""
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, int) and 0 <= label < count:
        return label
    near = difflib.get_close_matches(str(label), names, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    what = f"{list_classes(names)}, or their numbers, 0 to {count - 1}" if names else f"0 to {count - 1}"
    raise UsageError(f"label={label}: the classes are {what}{hint}")


def list_classes(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)})" if len(names) > most else "")


def label_context(labels: Tensor, classes: int) -> Tensor:
    """Labels, int64 (N,), as the context of a conditional flow: one-hot, float32 (N, classes)."""
    return torch.nn.functional.one_hot(labels, classes).float()
