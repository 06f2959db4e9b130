"""The demo's table: quality beside its baselines, experts per token, MoE FLOPs, seconds per update.

    python scripts/tools/report.py --runs runs/demo --models xmoe topk dense --mt-text data/mt-sample/text

Scores with sacreBLEU on untokenised text, prints the table, the signatures and three translations, and
writes report.json and report.md beside the runs.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from results import (
    ResultError,
    hypotheses,
    lines,
    markdown,
    read,
    record,
    routing,
    score,
    seconds_per_update,
    write,
    write_json,
)
from rich.console import Console
from rich.table import Table

METRICS = ("bleu", "chrf")
SETS = {"test": "CLDR (synthetic)", "test1": "real text"}
COLUMNS = (
    ("model", "model"),
    ("test_bleu", "CLDR BLEU"),
    ("test_chrf", "CLDR chrF"),
    ("test1_bleu", "real BLEU"),
    ("test1_chrf", "real chrF"),
    ("perplexity", "LM perplexity"),
    ("experts", "experts/token enc, dec, LM"),
    ("flops", "MoE FLOPs / dense FFN enc, dec, LM"),
    ("seconds", "s/update MT, LM"),
)


def routing_row(folder: Path) -> dict[str, str]:
    """Per side, on held-out text."""
    mt = record(folder / "translation/validate.log", "test1")
    lm = record(folder / "language_model/validate.log", "test")
    sides = [routing(stats, side) for stats, side in ((mt, "encoder"), (mt, "decoder"), (lm, "decoder"))]
    return {
        "experts": ", ".join("-" if math.isnan(experts) else f"{experts:.2f}" for experts, _ in sides),
        "flops": ", ".join(f"{flops:.2f}" for _, flops in sides),
    }


def model_row(runs: Path, model: str, text: Path) -> tuple[dict[str, Any], dict[str, str]]:
    mt, lm = runs / model / "translation", runs / model / "language_model"
    row: dict[str, Any] = {"model": model}
    for split in SETS:
        reference = lines(text / f"{split}.de")
        scores, signatures = score(hypotheses(mt / f"{split}.out"), reference, METRICS)
        row |= {f"{split}_{name}": value for name, value in scores.items()}
    found = re.findall(r"Perplexity: ([\d.]+)", read(lm / "evaluate.log"))
    row["perplexity"] = float(found[-1])
    rates = [seconds_per_update(folder / "train.log") for folder in (mt, lm)]
    row["seconds"] = ", ".join(f"{rate:.3f}" for rate in rates)
    return row | routing_row(runs / model), signatures


def baseline_rows(runs: Path, text: Path) -> list[dict[str, Any]]:
    copying: dict[str, Any] = {"model": "copying the source"}
    for split in SETS:
        scores, _ = score(lines(text / f"{split}.en"), lines(text / f"{split}.de"), METRICS)
        copying |= {f"{split}_{name}": value for name, value in scores.items()}
    bigram = json.loads(read(runs / "bigram.json"))
    return [copying, {"model": "bigram (Kneser-Ney)", "perplexity": bigram["perplexity"]}]


def cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key, "")
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def examples(runs: Path, text: Path) -> list[tuple[str, str, str]]:
    """(source, reference, translation): a third, half and two thirds through the real test set."""
    hypothesis = hypotheses(runs / "xmoe/translation/test1.out")
    source, reference = lines(text / "test1.en"), lines(text / "test1.de")
    return [(source[i], reference[i], hypothesis[i]) for i in (len(source) * n // 12 for n in (4, 6, 8))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, required=True, help="holds MODEL/translation, MODEL/language_model"
    )
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--mt-text", type=Path, required=True, help="folder of {test,test1}.{en,de}")
    args = parser.parse_args()
    rows, signatures = [], {}
    try:
        for model in args.models:
            row, signatures = model_row(args.runs, model, args.mt_text)
            rows.append(row)
        rows += baseline_rows(args.runs, args.mt_text)
        shown = examples(args.runs, args.mt_text)
    except ResultError as error:
        raise SystemExit(f"report: {error}") from None

    console = Console(width=None if Console().is_terminal else 160)
    table = Table(title="Held-out results")
    for key, title in COLUMNS:
        table.add_column(title, justify="left" if key == "model" else "right")
    for row in rows:
        table.add_row(*(cell(row, key) for key, _ in COLUMNS))
    console.print(table)
    for name, signature in signatures.items():
        console.print(f"{name}: {signature}", markup=False, highlight=False)
    for source, reference, translation in shown:
        shown_text = f"\nsource      {source}\nreference   {reference}\nXMoE        {translation}"
        console.print(shown_text, markup=False, highlight=False)

    cells = [[cell(row, key) for key, _ in COLUMNS] for row in rows]
    write(args.runs / "report.md", markdown([title for _, title in COLUMNS], cells))
    everything = {"rows": rows, "signatures": signatures, "examples": shown}
    write_json(args.runs / "report.json", everything)


if __name__ == "__main__":
    main()
