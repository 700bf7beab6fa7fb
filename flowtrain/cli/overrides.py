"""The words of a command line, parsed by Hydra's grammar."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from flowtrain.cli import names
from flowtrain.cli.hydra_internals import split_sweep
from flowtrain.errors import UsageError


def parse(words: list[str]) -> list:
    """Hydra's parse of ``key=value`` words. Raises UsageError for a word outside its grammar."""
    for word in words:
        try:
            item = OverridesParser.create().parse_override(word)
        except HydraException as error:
            if "=" not in word and not word.startswith("~"):
                raise UsageError(f"'{word}' is not key=value") from None
            if refusal := names.quoting(word):
                raise refusal from None
            reason, file = str(error).splitlines()[0], ""
            if word.partition("=")[0] in names.FROM_FILE:
                file = f"; {word.partition('=')[0]}=@FILE reads names from a file"
            raise UsageError(
                f"cannot read '{word}': {reason} (quote special characters: \"key='a,b'\"){file}"
            ) from None
        if names.misread(item):
            why = "look like a number, true, false or null"
            raise names.quoting(word, why) or UsageError(f"{word}: quote names that {why}")
    return OverridesParser.create().parse_overrides(words)


def split_jobs(words: list[str], multirun: bool, search: bool = False) -> list[list[str]]:
    """The words of each job; of a ``search``, which runs but some of them, each value once. Raises UsageError for
    several values without ``--multirun``."""
    parsed = parse(words)
    if not multirun:
        for item in parsed:
            if item.is_sweep_override():
                key = item.key_or_group
                raise UsageError(
                    f"'{item.input_line}' holds several values: add --multirun, or write {key}=[a,b] for a list"
                )
        return [words]
    if not search:
        try:
            return split_sweep(parsed)
        except HydraException as error:
            raise UsageError(f"{error}; it needs a search, such as hydra/sweeper=optuna") from error
    parsed = [*{item.key_or_group: item for item in parsed}.values()]  # the last of each key wins
    fixed = [item.input_line for item in parsed if not item.is_sweep_override()]
    swept = [_some_values(item) for item in parsed if item.is_sweep_override()]
    first = [values[0] for values in swept]
    others = [[*first[:i], value, *first[i + 1 :]] for i, values in enumerate(swept) for value in values[1:]]
    return [[*fixed, *job] for job in (first, *others)]


def _some_values(item) -> list[str]:
    """The words of the values of a sweep; of an interval, its ends."""
    key = item.get_key_element()
    if item.is_interval_sweep():
        return [f"{key}={end}" for end in (item.value().start, item.value().end)]
    return [f"{key}={value}" for value in item.sweep_string_iterator()]
