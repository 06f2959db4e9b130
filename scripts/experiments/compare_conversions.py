"""One Markdown table of several reports of xmoe-convert: perplexity (FFN FLOPs) at each budget.

python scripts/run.py experiments.compare_conversions RUN/*.json
"""

import argparse
from pathlib import Path
from typing import Any

from experiments.results import read_json
from xmoe_fairseq.tables import markdown


def table(reports: list[dict[str, Any]]) -> str:
    """Rows in the order of fine-tuning and grouping; columns are the budgets that any report has."""
    reports.sort(key=lambda r: (r["about"]["fine-tuning updates"], r["about"]["grouping"]))
    names = dict.fromkeys(name for report in reports for name in report["rows"] if name != "chosen")
    rows = []
    for report in reports:
        about = report["about"]
        updates = about["fine-tuning updates"]
        tuned = f"{updates} updates of {about['fine-tuned']}" if updates else "none"
        cells = [about["grouping"], about["experts"], about["thresholds"], tuned]
        rows.append([*map(str, cells), *(cell(report["rows"].get(name)) for name in names)])
    return markdown(["grouping", "experts", "thresholds", "fine-tuning", *names], rows)


def cell(row: dict[str, Any] | None) -> str:
    return f"{row['perplexity']:.2f} ({row['flops']:.2f})" if row else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", help="the .json files beside the checkpoints")
    reports = list(map(read_json, parser.parse_args().reports))
    print(f"dense: perplexity {reports[0]['reference']['perplexity']:.2f}\n\n{table(reports)}", end="")


if __name__ == "__main__":
    main()
