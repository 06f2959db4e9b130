"""The demo's table: quality beside its baselines, experts per token, MoE FLOPs, seconds per update.

    python scripts/run.py experiments.report --runs OUT --models xmoe-s4 dense --mt-text data/mt-sample/text

Reads what score.py found for the last checkpoints, prints the table, the signatures and three translations of
the first model, and writes report.json and report.md beside the runs.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from experiments.evaluation import hypotheses, score
from experiments.results import lines, median_seconds, read_json, write_json
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


def model_row(runs: Path, model: str) -> Row:
    folders = [runs / model / name for name in ("translation", "language_model")]
    mt, lm = (read_json(folder / "scores.last.json")["splits"] for folder in folders)
    sides = [mt["test1"]["routing"].get(side) for side in ("encoder", "decoder")]
    sides.append(lm["test"]["routing"].get("decoder"))  # a dense model has none
    return {
        "model": model, **{f"{split}_{name}": mt[split][name] for split in SETS for name in METRICS},
        "perplexity": lm["test"]["perplexity"],
        "experts": ", ".join(f"{side['experts']:.2f}" if side else "-" for side in sides),
        "flops": ", ".join(f"{side['flops'] if side else 1:.2f}" for side in sides),
        "seconds": ", ".join(f"{median_seconds(folder / 'train.log'):.3f}" for folder in folders),
    }  # fmt: skip


def baseline_rows(runs: Path, text: Path) -> list[Row]:
    copying: Row = {"model": "copying the source"}
    for split in SETS:
        scores, _ = score(lines(text / f"{split}.en"), lines(text / f"{split}.de"), METRICS)
        copying |= {f"{split}_{name}": value for name, value in scores.items()}
    bigram = read_json(runs / "bigram.json")["perplexity"]
    return [copying, {"model": "bigram (Kneser-Ney)", "perplexity": bigram}]


def cell(row: Row, key: str) -> str:
    value = row.get(key, "")
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def examples(run: Path, text: Path) -> list[tuple[str, str, str]]:
    """(source, reference, translation): a third, half and two thirds through the real test set."""
    hypothesis = hypotheses(run / "score.last/test1.out")
    source, reference = lines(text / "test1.en"), lines(text / "test1.de")
    return [(source[i], reference[i], hypothesis[i]) for i in (len(source) * n // 12 for n in (4, 6, 8))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, required=True, help="has MODEL/translation, MODEL/language_model"
    )
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--mt-text", type=Path, required=True, help="folder of {test,test1}.{en,de}")
    args = parser.parse_args()
    rows = [model_row(args.runs, model) for model in args.models] + baseline_rows(args.runs, args.mt_text)
    first = args.runs / args.models[0] / "translation"
    signatures = {name: read_json(first / "scores.last.json")["signatures"][name] for name in METRICS}
    shown = examples(first, args.mt_text)
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
