"""One Markdown table of several reports of xmoe-convert: perplexity (FFN FLOPs) at each budget.

python scripts/tools/compare_conversions.py RUN/*.json
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def lines(reports: list[dict[str, Any]]) -> Iterator[str]:
    """Rows in the order of grouping and fine-tuning; columns are the budgets that any report has."""
    names = dict.fromkeys(name for report in reports for name in report["rows"] if name != "chosen")
    yield f"dense: perplexity {reports[0]['reference']['perplexity']:.2f}"
    yield ""
    yield "| grouping | experts | thresholds | fine-tuning | " + " | ".join(names) + " |"
    yield "|---" * (4 + len(names)) + "|"
    for report in reports:
        about = report["about"]
        updates = about["fine-tuning updates"]
        tuned = f"{updates} updates of {about['fine-tuned']}" if updates else "none"
        cells = [about["grouping"], about["experts"], about["thresholds"], tuned]
        cells += [cell(report["rows"].get(name)) for name in names]
        yield "| " + " | ".join(map(str, cells)) + " |"


def cell(row: dict[str, Any] | None) -> str:
    return f"{row['perplexity']:.2f} ({row['flops']:.2f})" if row else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", help="the .json files beside the checkpoints")
    reports = [json.loads(path.read_text()) for path in parser.parse_args().reports]
    reports.sort(key=lambda r: (r["about"]["fine-tuning updates"], r["about"]["grouping"]))
    print("\n".join(lines(reports)))


if __name__ == "__main__":
    main()
