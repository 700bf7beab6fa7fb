"""The rows of a benchmark as a table, as Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path

from flowtrain.benchmarks.peers import PACKAGES
from flowtrain.errors import UsageError

HEAD = ("work", "measured", "to", "ratio", "reach", "reached")
VERDICTS = ("work", "variant", "per second", "beside the best peer")


def cells(row: dict) -> tuple[str, ...]:
    """The cells of a row as text."""
    mine, theirs = (*row["amounts"], "", "")[:2]
    spread = f" ± {row['spread']:.2g}" if row["spread"] else ""
    unit = f" {row['unit']}" if row["unit"] not in ("", "×") else ""
    reached = {True: "yes", False: "no", None: ""}[row["reached"]]
    return (
        row["work"],
        f"{row['ours']} {mine}".strip(),
        f"{row['theirs'] or ''} {theirs}".strip(),
        f"{row['value']:.3g}{spread}{unit}",
        "" if row["target"] is None else f"{row['target']:.3g}{unit}",
        reached,
    )


def verdicts(rows: list[dict]) -> list[tuple[str, ...]]:
    """What each variant of ours does in a second, and how it stands beside the best peer: the cells of a table."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for row in rows:
        if row["ours"] not in PACKAGES and (row["rate"] or row["beside"]):
            found.setdefault((row["work"], row["ours"]), (row["rate"], _compare(row["beside"])))
    return [(*key, *line) for key, line in found.items()]


def _compare(beside: dict | None) -> str:
    if beside is None:
        return ""
    peer, ratio, spread = beside["peer"], beside["ratio"], beside["spread"]
    if beside["of"] == "memory":
        return f"{ratio:.3g} × the memory of {peer}"
    if abs(ratio - 1) <= spread:
        return f"as fast as {peer}"
    return f"{1 / ratio:.3g} × faster than {peer}" if ratio < 1 else f"{ratio:.3g} × slower than {peer}"


def table(rows: list[dict]) -> str:
    """The rows as aligned text, what they say about ours, and a summary."""
    parts = [_align([HEAD, *map(cells, rows)])]
    about = verdicts(rows)
    if about:
        parts.append(_align([VERDICTS, *about]))
    return "\n\n".join([*parts, summary(rows)])


def _align(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)


def summary(rows: list[dict]) -> str:
    """How many rows reached their targets, which did not, and how many are not behind the best peer."""
    with_target = [row for row in rows if row["target"] is not None]
    missed = [row for row in with_target if not row["reached"]]
    names = "".join(
        f"\nnot reached: {row['work']}, {row['ours']}" + f" to {row['theirs']}" * bool(row["theirs"]) for row in missed
    )
    beside = {(row["work"], row["ours"]): row["beside"] for row in rows if row["beside"]}
    ahead = sum(one["ratio"] - one["spread"] < 1 for one in beside.values())
    peers = f"\nnot behind the best peer, median less spread: {ahead} of {len(beside)}" if beside else ""
    return f"{len(with_target) - len(missed)} of {len(with_target)} rows reached{peers}{names}"


def markdown(reports: list[dict]) -> str:
    """Runs on different processors side by side: the section of docs/benchmarks.md."""
    names = [report["processor"] for report in reports]
    found: dict[tuple[str, ...], dict[str, dict]] = {}
    for report in reports:
        for row in report["rows"]:
            key = row["work"], row["ours"], row["theirs"] or ""
            found.setdefault(key, {})[report["processor"]] = row
    ratios = [(*key, *(_ratio(runs.get(name)) for name in names)) for key, runs in found.items()]
    abouts = [{line[:2]: line[2:] for line in verdicts(report["rows"])} for report in reports]
    keys = dict.fromkeys(key for about in abouts for key in about)
    lines = [(*key, *(_rate_and_verdict(about.get(key)) for about in abouts)) for key in keys]
    parts = [
        "\n".join(map(_origin, reports)),
        _markdown_table((*HEAD[:3], *names), ratios),
        _markdown_table((*VERDICTS[:2], *names), lines),
        *(f"{report['processor']}: " + summary(report["rows"]).replace("\n", "\n\n") for report in reports),
    ]
    return "\n\n".join(parts)


def _origin(report: dict) -> str:
    load = " and ".join(f"{load:.2f}" for load in (report["load"]["before"], report["load"]["after"]))
    peers = ", ".join(f"{name} {version}" for name, version in report["peers"].items()) or "none"
    return (
        f"- {report['processor']}, {report['date']}: `{report['command']}` in {report['seconds'] / 60:.0f} minutes on "
        f"{report['device']}, {report['threads']} threads, {report['cores']} cores, load {load} before and after; "
        f"torch {report['torch']}; peers {peers}."
    )


def _ratio(row: dict | None) -> str:
    """A cell of the table of ratios: the ratio, what both sides cost, and the reach."""
    if row is None:
        return ""
    *_, value, reach, reached = cells(row)
    amounts = f" ({' to '.join(row['amounts'])})" if row["amounts"] else ""
    verdict = f"; reach {reach}: {reached}" if reach else ""
    return f"{value}{amounts}{verdict}"


def _rate_and_verdict(found: tuple[str, ...] | None) -> str:
    return "; ".join(filter(None, found or ()))


def _markdown_table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


def need_plots() -> None:
    """Check that matplotlib is installed.

    Raises:
        UsageError: it is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("a plot needs matplotlib: pip install 'flowtrain[plots]', or plot=false") from error


def plot(rows: list[dict], path: Path) -> None:
    """Plot the ratios with their spreads on a logarithmic axis, and their targets."""
    from matplotlib.figure import Figure

    ratios = [row for row in rows if row["unit"] == "×"][::-1]
    figure = Figure((11, 1.2 + 0.24 * len(ratios)), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for i, row in enumerate(ratios):
        colour = {True: "tab:green", False: "tab:red", None: "tab:gray"}[row["reached"]]
        axes.errorbar(row["value"], i, xerr=row["spread"], fmt="o", color=colour, markersize=4, capsize=2)
        if row["target"] is not None:
            axes.plot(row["target"], i, marker="|", color="black", markersize=12)
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_xscale("log")
    names = [f"{row['work']}: {row['ours']} to {row['theirs']}" for row in ratios]
    axes.set_yticks(range(len(ratios)), names, fontsize=7)
    axes.set_ylim(-1, len(ratios))
    axes.set_xlabel("ratio ± spread; black marks are the targets")
    figure.savefig(path)
