"""The headline figures and what they mean."""

from __future__ import annotations

import math

from flowtrain.report.grids import plus_minus, share
from flowtrain.report.material import Material, SplitLikelihoods
from flowtrain.report.page import Figure, Page
from flowtrain.report.run import RunRecord

UNCHANGING = ("experiment", "devices", "threads", "resume", "dataset.root", "dataset.path")  # words of a command line
NAMES = {"test": "test", "val": "validation", "train": "train"}


def add(page: Page, record: RunRecord, material: Material) -> None:
    section = page.section("Figures")
    found = [Figure(NAMES[name], *_value(material, one)) for name, one in _likelihoods(material).items()]
    if (published := material.published) is not None:
        unit = "bits/dim" if published["unit"] == "bits_per_dim" else published["unit"]
        ours, why = published["ours"], published["not_comparable"]
        note = f"not comparable: {why}" if ours is None else f"ours in this unit: {_plain(ours, 4)}"
        if any(word.partition("=")[0] not in UNCHANGING for word in record.overrides or ()):
            note += "; this run changes the experiment's settings, see Configuration"
        found.append(Figure("published", _plain(published["value"], 4), unit, f"{published['source']}; {note}"))
    if material.has_bits and material.grey_levels:
        uniform = math.log2(material.grey_levels)
        found.append(Figure("uniform code", f"{uniform:.3g}", "bits/dim", "what it takes without a model"))
    section.figures(found)
    section.text(" ".join(_reading(material)))
    section.note(_details(material))
    for part in ("likelihoods", "figures"):
        for note in material.notes.get(part, ()):
            section.note(note)


def _likelihoods(material: Material) -> dict[str, SplitLikelihoods]:
    """Of each split, the test split first."""
    return {name: material.likelihoods[name] for name in NAMES if name in material.likelihoods}


def _value(material: Material, one: SplitLikelihoods) -> tuple[str, str, str]:
    """The figure with its error, its unit, and a note."""
    of = f"{one.examples:,} examples" if one.examples == one.total else f"{one.examples:,} of {one.total:,} examples"
    if not material.has_bits:
        return plus_minus(one.mean, one.stderr, 4 if abs(one.mean) < 100 else 2), "nats", of
    error = None if one.stderr is None else abs(material.to_unit(one.stderr))
    return (
        plus_minus(material.to_unit(one.mean), error),
        "bits/dim",
        f"{plus_minus(one.mean, one.stderr, 2)} nats; {of}",
    )


def _plain(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".rstrip("0").rstrip(".").replace("-", "−")


def _reading(material: Material) -> list[str]:
    """The figures in plain language."""
    found = _likelihoods(material)
    if not found:
        return ["No likelihood was computed for this report."]
    name, one = next(iter(found.items()))
    value, lines = material.to_unit(one.mean), []
    if material.has_target:
        lines.append(
            "The mean of log p(x) − log q(x) over samples x of the flow q, the evidence lower bound of the target p, is"
            f" {_plain(value, 4)} nats. It is log Z less the reverse Kullback-Leibler divergence."
            " flowtrain eval estimates log Z and the effective sample size."
        )
    elif material.has_bits:
        lines.append(
            f"On the {NAMES[name]} split the model needs {value:.3f} bits for each of the {material.dimensions:,}"
            " numbers of an example: −log₂ of its probability, divided by their number, so less is better."
        )
        if material.grey_levels:
            uniform = math.log2(material.grey_levels)
            less = f"{share(value / uniform)} of that" if value < uniform else "more: it has learned nothing yet"
            lines.append(
                f"Without a model, {material.grey_levels} equally likely grey levels take {uniform:.3g} bits each;"
                f" an ideal code made from this model would take {less}."
            )
    else:
        lines.append(
            f"An example of the {NAMES[name]} split has a log-density of {_plain(value, 3)} nats on average; more is"
            " better. A density depends on the units of the data, so this compares models of the same data only."
        )
    if material.lower_bound:
        lines.append("Values are missing, so this is a lower bound of the likelihood of those that are there.")
    if "train" in found and "val" in found:
        lines.append(_overfitting(material, found["train"], found["val"]))
    return lines


def _overfitting(material: Material, train: SplitLikelihoods, val: SplitLikelihoods) -> str:
    gap = abs(material.to_unit(train.mean) - material.to_unit(val.mean))
    errors = [0.0 if one.stderr is None else abs(material.to_unit(one.stderr)) for one in (train, val)]
    error, unit = math.hypot(*errors), material.unit
    how = f"{plus_minus(gap, error)} {unit}"
    if gap <= 2 * error:
        return f"Train and validation differ by {how}, within two standard errors: no overfitting shows."
    if train.mean > val.mean:
        return (
            f"Examples that the model was trained on do better than those of the validation split, by {how}: it"
            " overfits by about as much. More data, fewer parameters or fewer steps may help."
        )
    return f"The validation split does better than the train split, by {how}: its examples are easier."


def _details(material: Material) -> str:
    parts = ["± is one standard error over the examples"]
    sources = {NAMES[name]: one.source for name, one in material.likelihoods.items() if one.source}
    parts += [f"the {name} figure is that of {source}" for name, source in sources.items()]
    computed = [NAMES[name] for name, one in material.likelihoods.items() if not one.source]
    if computed:
        parts.append(f"{', '.join(computed)}: computed for this report with one draw of noise for each example")
    if "test" in material.likelihoods:
        parts.append("the test split is read only here and by flowtrain eval, after the weights were chosen")
    return "; ".join(parts) + "."
