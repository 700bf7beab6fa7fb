"""Write the measurements of scripts/scaling.py as the tables of scaling.md and the plots of scaling.png."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import sections
from matplotlib.figure import Figure

from flowtrain.benchmarks.session import clock

LINEAR, PASSES = 1.0, 2.5  # targets: the power of D and of depth; sampling in density passes


def write(found: dict, folder: Path) -> None:
    """Write each table into its section of ``folder``/scaling.md, and draw scaling.png beside it."""
    for name, section in SECTIONS.items():
        sections.write(folder / "scaling.md", name, section(found))
    draw(found, folder / "scaling.png")


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _run(found: dict) -> str:
    machine = found["machine"]
    before, after = machine["load"]
    shared = before > 0.5  # the load after includes the two processes' own work
    return (
        f"{machine['date']}: torch {machine['torch']}, one thread; {machine['cores']} cores, load {before:.1f} and "
        f"{after:.1f} before and after, so the machine was {'shared with other work' if shared else 'otherwise idle'}; "
        f"{machine['cpu_seconds']:.0f} CPU seconds, processes that trained together not counted."
    )


def _growth(found: dict) -> str:
    curves = found["growth"]
    kinds = [("density", "s"), ("training step", "s"), ("sampling", "s"), ("density", "B"), ("training step", "B")]
    head = ["axis", "family", *(work + ", memory" * (unit == "B") for work, unit in kinds)]
    rows = []
    for axis, family in dict.fromkeys((one["axis"], one["family"]) for one in curves):
        mine = {(one["work"], one["unit"]): one for one in curves if (one["axis"], one["family"]) == (axis, family)}
        at = mine[kinds[0]]["at"]
        cells = [f"{_power(mine[kind]['exponent'])} ({_power(mine[kind]['last_exponent'])})" for kind in kinds]
        rows.append([f"{axis} {at[0]:,} … {at[-1]:,}", family, *cells])
    return _table(head, rows) + "\n\n" + _linear(curves)


def _linear(curves: list[dict]) -> str:
    """State whether the likelihood's time grows at most linearly with D and depth, over all points and at the end."""
    lines = []
    for axis in ("D", "depth"):
        mine = [one for one in curves if (one["work"], one["unit"], one["axis"]) == ("density", "s", axis)]
        verdicts = []
        for which, where in (("exponent", "over all points"), ("last_exponent", "between the last two")):
            over = [f"{one['family']} {_power(one[which])}" for one in mine if not _at_most(one[which], LINEAR)]
            verdicts.append(f"{where} {'all but ' + ', '.join(over) if over else 'all families'}")
        lines.append(f"- Likelihood linear in {axis}, a power less its spread of at most 1: {'; '.join(verdicts)}.")
    return "\n".join(lines)


def _at_most(spread: dict, bound: float) -> bool:
    return round(spread["median"] - spread["half_range"], 2) <= bound


def _power(spread: dict) -> str:
    error = f" ± {spread['half_range']:.2f}" if spread["half_range"] >= 0.005 else ""
    return f"{round(spread['median'], 2) + 0.0:.2f}{error}".replace("-", "−")  # + 0.0 avoids −0.00


def _rows(found: dict) -> str:
    curves = found["rows"]
    show = {"s": clock, "B": _size}
    counts = curves[0]["at"]
    head = ["work", *(f"{count:,} rows" for count in counts), "power"]
    body = (
        [
            one["work"] + ", memory" * (one["unit"] == "B"),
            *map(show[one["unit"]], one["measured"]),
            _power(one["exponent"]),
        ]
        for one in curves
    )
    return _table(head, body)


def _autoregressive(found: dict) -> str:
    points = found["autoregressive"]
    head = ["family", "D", "hidden units", "layers", "density", "sampling", "sampling ÷ density", f"≤ {PASSES}"]
    body = [
        [
            one["family"],
            one["D"],
            one["hidden"],
            one["layers"],
            clock(one["density"]),
            clock(one["sampling"]),
            f"{one['ratio']['median']:.2f} ± {one['ratio']['half_range']:.2f}",
            "yes" if _at_most(one["ratio"], PASSES) else "no",
        ]
        for one in points
    ]
    return _table(head, body)


def _families(found: dict) -> str:
    head = ["`model=`", "parameters", "density, an example", "sampling, an example", "sampling ÷ density"]
    body = (
        [
            f"`{one['model']}`",
            f"{one['parameters']:,}",
            _micro(one["density"]),
            _micro(one["sampling"]),
            f"{one['sampling'] / one['density']:.2f}",
        ]
        for one in found["families"]
    )
    return _table(head, body)


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.3g} µs" if seconds < 1e-3 else f"{1e3 * seconds:,.3g} ms"


def _size(count: float) -> str:
    return f"{count / 2**20:,.3g} MiB" if count >= 2**20 else f"{count / 2**10:,.3g} KiB"


def _milliseconds(spread: dict) -> str:
    return f"{1e3 * spread['median']:.3g} ± {1e3 * spread['half_range']:.2g}".replace("-", "−")


def _parallel(found: dict) -> str:
    flows = found["parallel"]["flows"]
    parts = [f"{what} {part}" for what in ("CPU ms", "wall-clock ms") for part in ("alone", "shared", "overhead")]
    head = ["flow", "gradients", *parts]
    body = (
        [
            f"{one['flow']}, D = {one['size'][0]}, batch {one['batch']} each",
            _size(one["gradient_bytes"]),
            *(
                _milliseconds(one[name][part])
                for name in ("process_time", "perf_counter")
                for part in ("alone", "shared", "overhead")
            ),
        ]
        for one in flows
    )
    messages = _table(
        ["all-reduce of", "CPU ms of a process", "wall-clock ms"],
        (
            [_size(one["bytes"]), _milliseconds(one["process_time"]), _milliseconds(one["perf_counter"])]
            for one in found["parallel"]["messages"]
        ),
    )
    return f"{_table(head, body)}\n\n{messages}"


def _overlap(found: dict) -> str:
    head = ["flow", "step", "backward", "all-reduces, from – to", "share of their time during backward"]
    body = []
    for one in found["parallel"]["flows"]:
        for number, step in enumerate(one["profile"], 1):
            spans = ", ".join(f"{start:.1f} – {end:.1f}" for start, end in step["all_reduce"])
            start, end = step["backward"]
            body.append([one["flow"], number, f"{start:.1f} – {end:.1f}", spans, f"{overlap(step):.0%}"])
    medians = ", ".join(
        f"{one['flow']} {statistics.median(map(overlap, one['profile'])):.0%}" for one in found["parallel"]["flows"]
    )
    return f"{_table(head, body)}\n\nThe median: {medians}."


def overlap(step: dict) -> float:
    """The share of the all-reduces' time during which backward still ran."""
    start, end = step["backward"]
    inside = sum(max(0.0, min(last, end) - max(first, start)) for first, last in step["all_reduce"])
    return inside / sum(last - first for first, last in step["all_reduce"])


def _presets(found: dict) -> str:
    head = ["preset", "gradients", "small reductions", "kernels", "operations an example", "on this core", "an example"]
    body = (
        [
            f"`{one['preset']}`",
            _size(one["gradient_bytes"]),
            one["small"],
            f"{one['kernels']:,}",
            f"{one['flops'] / 1e9:.3g}·10⁹",
            f"{one['flops'] / one['seconds'] / 1e9:.3g}·10⁹ a second",
            clock(one["seconds"]),
        ]
        for one in found["parallel"]["presets"]
    )
    return _table(head, body)


def _model(found: dict) -> str:
    head = ["preset", "GPUs", "examples on each", "compute", "all-reduce", "exposed", "efficiency"]
    body = (
        [
            f"`{one['preset']}`",
            one["gpus"],
            one["batch"],
            clock(one["compute"]),
            clock(one["all_reduce"]),
            clock(one["exposed"]),
            f"{one['efficiency']:.0%}",
        ]
        for one in found["parallel"]["model"]
    )
    return _table(head, body)


SECTIONS: dict[str, Callable[[dict], str]] = {
    "run": _run,
    "growth": _growth,
    "rows": _rows,
    "autoregressive": _autoregressive,
    "families": _families,
    "parallel": _parallel,
    "overlap": _overlap,
    "presets": _presets,
    "model": _model,
}


def draw(found: dict, path: Path) -> None:
    """Plot a column for each axis and a row for each kind of work; the last row has rows, passes and messages."""
    axes = list(dict.fromkeys(one["axis"] for one in found["growth"]))
    kinds = [("density", "s"), ("training step", "s"), ("sampling", "s"), ("training step", "B")]
    figure = Figure((4 * len(axes), 3.2 * (len(kinds) + 1)), dpi=80, layout="constrained", facecolor="white")
    panels = figure.subplots(len(kinds) + 1, len(axes))
    for line, (work, unit) in zip(panels, kinds):
        for panel, axis in zip(line, axes):
            name = f"{work}, " + {"s": "CPU seconds", "B": "peak bytes"}[unit]
            curves = [one for one in found["growth"] if (one["axis"], one["work"], one["unit"]) == (axis, work, unit)]
            for one in curves:
                _line(panel, one["at"], one["measured"], f"{one['family']}: {_power(one['exponent'])}")
            _label(panel, axis, name)
    for panel, unit in zip(panels[-1], ("s", "B")):
        for one in found["rows"]:
            if one["unit"] == unit:
                _line(panel, one["at"], one["measured"], f"{one['work']}: {_power(one['exponent'])}")
        _label(panel, "rows of data", {"s": "CPU seconds", "B": "peak bytes"}[unit])
    passes, messages = panels[-1][2:4]
    for family in dict.fromkeys(one["family"] for one in found["autoregressive"]):
        points = [one for one in found["autoregressive"] if one["family"] == family]
        _line(passes, [one["D"] for one in points], [one["ratio"]["median"] for one in points], family)
    passes.axhline(PASSES, color="black", linewidth=0.8, linestyle="--")
    _label(passes, "D", "sampling ÷ a density pass")
    for name, label in (("process_time", "CPU seconds of a process"), ("perf_counter", "wall-clock")):
        # a median is a difference of two times
        sent = [one for one in found["parallel"]["messages"] if one[name]["median"] > 0]
        _line(messages, [one["bytes"] for one in sent], [one[name]["median"] for one in sent], label)
    _label(messages, "bytes of a message", "all-reduce of two processes, seconds")
    figure.savefig(path)


def _line(panel, x: list[float], y: list[float], label: str) -> None:
    panel.plot(x, y, marker="o", markersize=3, label=label)


def _label(panel, x: str, y: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    if high / low < 10:  # so that the ticks have numbers and noise does not look like growth
        middle = math.sqrt(low * high)
        panel.set_ylim(middle / math.sqrt(10), middle * math.sqrt(10))
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
