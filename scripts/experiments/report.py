"""The demo's table: quality beside its baselines, experts per token, MoE FLOPs, seconds per update.

    python scripts/run.py experiments.report --runs OUT --models xmoe-s4 dense --mt-text data/mt-sample/text

Scores with sacreBLEU on untokenised text, prints the table, the signatures and three translations of the
first model, and writes report.json and report.md beside the runs.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from experiments.evaluation import hypotheses, last_number, score
from experiments.results import lines, median_seconds, read_json, record, routing, write_json
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.files import write_atomically

METRICS = ("bleu", "chrf")
SETS = ("test", "test1")  # CLDR (synthetic), real text
TITLES = {
    "model": "model", "test_bleu": "CLDR BLEU", "test_chrf": "CLDR chrF", "test1_bleu": "real BLEU",
    "test1_chrf": "real chrF", "perplexity": "LM perplexity", "experts": "experts/token enc, dec, LM",
    "flops": "MoE FLOPs / dense FFN enc, dec, LM", "seconds": "s/update MT, LM",
}  # fmt: skip
Row = dict[str, Any]


def routing_row(folder: Path) -> Row:
    """Per side, on held-out text."""
    mt = record(folder / "translation/validate.log", "test1")
    lm = record(folder / "language_model/validate.log", "test")
    sides = [routing(stats, side) for stats, side in ((mt, "encoder"), (mt, "decoder"), (lm, "decoder"))]
    return {
        "experts": ", ".join("-" if math.isnan(experts) else f"{experts:.2f}" for experts, _ in sides),
        "flops": ", ".join(f"{flops:.2f}" for _, flops in sides),
    }


def scored(of: dict[str, list[str]], text: Path) -> tuple[Row, dict[str, str]]:
    """Scores of translations by test set, and the signatures."""
    row: Row = {}
    for split, translations in of.items():
        scores, signatures = score(translations, lines(text / f"{split}.de"), METRICS)
        row |= {f"{split}_{name}": value for name, value in scores.items()}
    return row, signatures


def model_row(runs: Path, model: str, text: Path) -> tuple[Row, dict[str, str]]:
    mt, lm = runs / model / "translation", runs / model / "language_model"
    row, signatures = scored({split: hypotheses(mt / f"{split}.out") for split in SETS}, text)
    row["perplexity"] = last_number(lm / "evaluate.log", "Perplexity:")
    row["seconds"] = ", ".join(f"{median_seconds(folder / 'train.log'):.3f}" for folder in (mt, lm))
    return {"model": model} | row | routing_row(runs / model), signatures


def baseline_rows(runs: Path, text: Path) -> list[Row]:
    copying, _ = scored({split: lines(text / f"{split}.en") for split in SETS}, text)
    bigram = read_json(runs / "bigram.json")["perplexity"]
    return [{"model": "copying the source"} | copying, {"model": "bigram (Kneser-Ney)", "perplexity": bigram}]


def cell(row: Row, key: str) -> str:
    value = row.get(key, "")
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def examples(run: Path, text: Path) -> list[tuple[str, str, str]]:
    """(source, reference, translation): a third, half and two thirds through the real test set."""
    hypothesis = hypotheses(run / "translation/test1.out")
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
    found = [model_row(args.runs, model, args.mt_text) for model in args.models]
    rows, signatures = [row for row, _ in found], found[0][1]
    rows += baseline_rows(args.runs, args.mt_text)
    shown = examples(args.runs / args.models[0], args.mt_text)
    table = markdown([*TITLES.values()], [[cell(row, key) for key in TITLES] for row in rows])
    console = Console(width=None if Console().is_terminal else 160)
    console.print(Markdown("**Held-out results**\n\n" + table))
    said = [f"{name}: {signature}" for name, signature in signatures.items()]
    for source, reference, translation in shown:
        said.append(f"\nsource      {source}\nreference   {reference}\nXMoE        {translation}")
    console.print("\n".join(said), markup=False, highlight=False)
    write_atomically(args.runs / "report.md", table)
    write_json(args.runs / "report.json", {"rows": rows, "signatures": signatures, "examples": shown})


if __name__ == "__main__":
    main()
