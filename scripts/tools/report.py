"""The demo's table: quality beside its baselines, experts per token, MoE FLOPs, seconds per update.

    python scripts/tools/report.py --runs runs/demo --models xmoe topk dense --mt-text data/mt-sample/text

Scores with sacreBLEU on untokenised text, prints the table, the signatures and three translations, and
writes report.json and report.md beside the runs.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sacrebleu.metrics import BLEU, CHRF

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


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def hypotheses(path: Path) -> list[str]:
    """fairseq-generate prints sentences by length; D-<number> gives their place back."""
    found = re.findall(r"^D-(\d+)\t\S+\t(.*)$", path.read_text(encoding="utf-8"), re.M)
    return [text for _, text in sorted((int(number), text) for number, text in found)]


def score(hypothesis: list[str], reference: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    if len(hypothesis) != len(reference):
        raise SystemExit(f"{len(hypothesis)} translations of {len(reference)}: the evaluation was cut short")
    scores, signatures = {}, {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        scores[name] = metric.corpus_score(hypothesis, [reference]).score
        signatures[name] = str(metric.get_signature())
    return scores, signatures


def record(log: Path, group: str) -> dict[str, float]:
    """The last JSON record of a group that fairseq logged."""
    found = re.findall(rf"\| {group} \| (\{{.*\}})", log.read_text(encoding="utf-8"))
    return {key.removeprefix(f"{group}_"): float(value) for key, value in json.loads(found[-1]).items()}


def seconds_per_update(log: Path) -> float:
    rates = re.findall(r'"ups": "([\d.]+)"', log.read_text(encoding="utf-8"))
    return statistics.median(1 / float(rate) for rate in rates if float(rate) > 0)


def routing(folder: Path) -> dict[str, float | str]:
    """Per side, on held-out text; a dense model has none, and computes its FFN whole."""
    mt = record(folder / "translation/validate.log", "test1")
    lm = record(folder / "language_model/validate.log", "test")
    sides = ((mt, "encoder"), (mt, "decoder"), (lm, "decoder"))
    experts = [stats.get(f"moe_{side}_experts_per_token") for stats, side in sides]
    flops = [stats.get(f"moe_{side}_flops_vs_dense_ffn", 1.0) for stats, side in sides]
    return {
        "experts": ", ".join("-" if value is None else f"{value:.2f}" for value in experts),
        "flops": ", ".join(f"{value:.2f}" for value in flops),
    }


def model_row(runs: Path, model: str, text: Path) -> tuple[dict[str, Any], dict[str, str]]:
    mt, lm = runs / model / "translation", runs / model / "language_model"
    row: dict[str, Any] = {"model": model}
    for split in SETS:
        scores, signatures = score(hypotheses(mt / f"{split}.out"), lines(text / f"{split}.de"))
        row |= {f"{split}_{name}": value for name, value in scores.items()}
    found = re.findall(r"Perplexity: ([\d.]+)", (lm / "evaluate.log").read_text())
    row["perplexity"] = float(found[-1])
    rates = [seconds_per_update(folder / "train.log") for folder in (mt, lm)]
    row["seconds"] = ", ".join(f"{rate:.3f}" for rate in rates)
    return row | routing(runs / model), signatures


def baseline_rows(runs: Path, text: Path) -> list[dict[str, Any]]:
    copying: dict[str, Any] = {"model": "copying the source"}
    for split in SETS:
        scores, _ = score(lines(text / f"{split}.en"), lines(text / f"{split}.de"))
        copying |= {f"{split}_{name}": value for name, value in scores.items()}
    bigram = json.loads((runs / "bigram.json").read_text())
    return [copying, {"model": "bigram (Kneser-Ney)", "perplexity": bigram["perplexity"]}]


def cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key, "")
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def examples(runs: Path, text: Path) -> list[tuple[str, str, str]]:
    """(source, reference, translation): a third, half and two thirds through the real test set."""
    hypothesis = hypotheses(runs / "xmoe/translation/test1.out")
    source, reference = lines(text / "test1.en"), lines(text / "test1.de")
    return [(source[i], reference[i], hypothesis[i]) for i in (len(source) * n // 12 for n in (4, 6, 8))]


def write(path: Path, content: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(content, encoding="utf-8")
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, required=True, help="holds MODEL/translation, MODEL/language_model"
    )
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--mt-text", type=Path, required=True, help="folder of {test,test1}.{en,de}")
    args = parser.parse_args()
    rows, signatures = [], {}
    for model in args.models:
        row, signatures = model_row(args.runs, model, args.mt_text)
        rows.append(row)
    rows += baseline_rows(args.runs, args.mt_text)
    shown = examples(args.runs, args.mt_text)

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

    markdown = ["| " + " | ".join(title for _, title in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    markdown += ["| " + " | ".join(cell(row, key) for key, _ in COLUMNS) + " |" for row in rows]
    write(args.runs / "report.md", "\n".join(markdown) + "\n")
    everything = {"rows": rows, "signatures": signatures, "examples": shown}
    write(args.runs / "report.json", json.dumps(everything, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
