"""One Markdown table of reports of xmoe-convert: perplexity (FFN FLOPs) at each budget, and test scores.

    python scripts/run.py experiments.compare_conversions OUT/*.json

The scores are those that scripts/dense_to_sparse.sh has left in OUT/dense, if it has.
"""

import argparse
from pathlib import Path
from typing import Any

from experiments.results import read_json
from xmoe_fairseq.tables import markdown

SHOWN = ("perplexity", "bleu", "chrf")


def order(report: tuple[Path, dict[str, Any]]) -> tuple[int, str]:
    return report[1]["about"]["fine-tuning updates"], report[1]["about"]["grouping"]


def table(reports: dict[Path, dict[str, Any]]) -> str:
    """Rows in the order of fine-tuning and grouping; columns: the budgets and scores that any has."""
    rows = []
    for path, report in sorted(reports.items(), key=order):
        about = report["about"]
        updates = about["fine-tuning updates"]
        tuned = f"{updates} updates of {about['fine-tuned']}" if updates else "none"
        row = {key: about[key] for key in ("grouping", "experts", "thresholds")} | {"fine-tuning": tuned}
        budgets = {name: cell(one) for name, one in report["rows"].items() if name != "chosen"}
        rows.append(row | budgets | scores(path.parent, path.stem))
    names = dict.fromkeys(name for row in rows for name in row)
    titles = sorted(names, key=lambda name: name.startswith("test"))
    return markdown(titles, [[row.get(title, "") for title in titles] for row in rows])


def cell(row: dict[str, Any]) -> str:
    return f"{row['perplexity']:.2f} ({row['flops']:.2f})"


def scores(folder: Path, tag: str) -> dict[str, str]:
    """On the test sets, as score.py found them; none if it has not."""
    path = folder / "dense" / f"scores.{tag}.json"
    splits = read_json(path)["splits"] if path.exists() else {}
    return {f"{s} {key}": f"{one[key]:.2f}" for s, one in splits.items() for key in SHOWN if key in one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", help="the .json files beside the checkpoints")
    reports = {path: read_json(path) for path in parser.parse_args().reports}
    first, report = next(iter(reports.items()))
    dense = [f"{name} {score}" for name, score in scores(first.parent, "last").items()]
    print("; ".join([f"dense: perplexity {report['reference']['perplexity']:.2f}", *dense]))
    print(f"\n{table(reports)}", end="")


if __name__ == "__main__":
    main()
