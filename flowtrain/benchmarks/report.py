"""The rows of a benchmark as a table, as Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path

from flowtrain.errors import UsageError

HEAD = ("work", "measured", "to", "ratio", "reach", "reached")


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


def table(rows: list[dict]) -> str:
    """The rows as aligned text, with a summary."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*text, summary(rows)])


def summary(rows: list[dict]) -> str:
    """How many rows reached their targets, and which did not."""
    with_target = [row for row in rows if row["target"] is not None]
    missed = [row for row in with_target if not row["reached"]]
    names = "".join(
        f"\nnot reached: {row['work']}, {row['ours']}" + f" to {row['theirs']}" * bool(row["theirs"]) for row in missed
    )
    return f"{len(with_target) - len(missed)} of {len(with_target)} rows reached{names}"


def markdown(report: dict) -> str:
    """A run as the section of docs/benchmarks.md."""
    load = " and ".join(f"{load:.2f}" for load in (report["load"]["before"], report["load"]["after"]))
    peers = ", ".join(f"{name} {version}" for name, version in report["peers"].items()) or "none"
    lines = [
        f"{report['date']}: `{report['command']}` on {report['device']}, {report['threads']} threads, "
        f"{report['cores']} cores, load {load} before and after; torch {report['torch']}; peers {peers}.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(cells(row)) + " |" for row in report["rows"]),
        "",
        summary(report["rows"]).replace("\n", "\n\n"),
    ]
    return "\n".join(lines)


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
