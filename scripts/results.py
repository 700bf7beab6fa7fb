"""Write the tables of docs/results.md, one for each data set, from results/*.json."""

import json
from pathlib import Path

import sections

TITLES = {
    "patches": "8×8 patches of BSDS300's photographs, D = 63, 200,000 for training: test nats a row, ± 2 standard "
    "errors. Near, not equal to, the papers' BSDS300.",
    "digits": "scikit-learn's digits, 8×8, 17 grey levels: test bits/dim",
    "mnist": "MNIST: test bits/dim",
    "cifar10": "CIFAR-10: test bits/dim",
}
HEAD = ("model", "test", "parameters", "budget", "machine", "published")


def table(title: str, results: list[dict]) -> str:
    """A Markdown table, best result first."""
    in_nats = "bits_per_dim" not in results[0]
    results = sorted(results, key=lambda r: -r["log_likelihood"] if in_nats else r["bits_per_dim"])
    rows = [HEAD, ["---"] * len(HEAD), *(row(result, in_nats) for result in results)]
    return "\n".join([title, "", *("| " + " | ".join(cells) + " |" for cells in rows)])


def row(result: dict, in_nats: bool) -> list[str]:
    """The cells of a result."""
    if in_nats:
        figure = f"{result['log_likelihood']:.2f} ± {2 * result['log_likelihood_stderr']:.2f}"
    else:
        figure = f"{result['bits_per_dim']:.3f} ± {result['bits_per_dim_stderr']:.3f}"
    return [
        f"[{result['model']}](../{result['file']})",
        figure,
        f"{result['parameters']:,}" if "parameters" in result else "–",
        result["budget"],
        result["machine"],
        result.get("published") or "–",
    ]


results = [{"file": path, **json.loads(path.read_text())} for path in sorted(Path("results").glob("*.json"))]
groups = {name: [result for result in results if result.get("table") == name] for name in TITLES}  # gpu.json has none
text = "\n\n".join(table(TITLES[name], group) for name, group in groups.items() if group)
sections.write(Path("docs/results.md"), "results", text)
print(text)
