"""The demo's table: quality, MoE FLOPs, seconds; and what it says of the first two models, in a sentence.

    python scripts/run.py experiments.report --runs OUT --models dense xmoe --mt-text data/mt-sample/text

Reads what score.py found for the last checkpoints, prints the table, the sentence and the signatures, and
writes report.json and report.md beside the runs. The second model is compared with the first.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from experiments.evaluation import score
from experiments.results import lines, median_seconds, read, read_json, write_json
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.files import write_atomically

METRICS = ("bleu", "chrf")
SETS = ("test", "test1")  # CLDR (synthetic), real text
TITLES = ("model", "CLDR BLEU", "real chrF", "LM perplexity", "MoE FLOPs", "s/update", "ms/sentence")
TRANSLATED = re.compile(r"Translated ([\d,]+) sentences .* in ([\d.]+)s")
QUALITIES = ("test_bleu", "test1_chrf", "perplexity")  # as in TITLES
Row = dict[str, Any]


def translating(run: Path) -> float:
    """Seconds per sentence, of all that fairseq-generate has translated."""
    found = [TRANSLATED.search(read(run / "score.last" / f"{split}.out")) for split in SETS]
    if None in found:
        raise UserError(f"{run}/score.last: a translation was cut short; remove the folder, begin again")
    sentences, seconds = ([float(one[n].replace(",", "")) for one in found if one] for n in (1, 2))
    return sum(seconds) / sum(sentences)


def flops(routing: dict[str, dict[str, float]]) -> float:
    """Over the dense FFNs', the mean of the sides that have experts; 1 of a dense model."""
    sides = [side["flops"] for side in routing.values()]
    return sum(sides) / len(sides) if sides else 1.0


def model_row(runs: Path, model: str) -> Row:
    mt_run, lm_run = (runs / model / name for name in ("translation", "language_model"))
    mt, lm = (read_json(run / "scores.last.json")["splits"] for run in (mt_run, lm_run))
    return {
        "model": model, **{f"{split}_{name}": mt[split][name] for split in SETS for name in METRICS},
        "perplexity": lm["test"]["perplexity"],
        "flops": [flops(mt["test1"]["routing"]), flops(lm["test"]["routing"])],
        "seconds": [median_seconds(run / "train.log") for run in (mt_run, lm_run)],
        "sentence": translating(mt_run),
    }  # fmt: skip


def baseline_rows(runs: Path, text: Path) -> list[Row]:
    copying: Row = {"model": "copying the source"}
    for split in SETS:
        scores, _ = score(lines(text / f"{split}.en"), lines(text / f"{split}.de"), METRICS)
        copying |= {f"{split}_{name}": value for name, value in scores.items()}
    bigram = read_json(runs / "bigram.json")["perplexity"]
    return [copying, {"model": "bigram (Kneser-Ney)", "perplexity": bigram}]


def cells(row: Row) -> list[str]:
    """Of translation and language model, where there are two numbers."""
    qualities = [f"{row[key]:.1f}" if key in row else "" for key in QUALITIES]
    costs = [
        ", ".join(f"{n:.{digits}f}" for n in row.get(key, []))
        for key, digits in (("flops", 2), ("seconds", 3))
    ]
    return [row["model"], *qualities, *costs, f"{1000 * row['sentence']:.1f}" if "sentence" in row else ""]


def in_words(first: Row, other: Row) -> str:
    mt, lm = (b / a for a, b in zip(first["seconds"], other["seconds"], strict=True))
    sentence = other["sentence"] / first["sentence"]
    qualities = [
        f"{title} {other[key]:.1f} for {first[key]:.1f}"
        for title, key in zip(TITLES[1:4], QUALITIES, strict=True)
    ]
    return (
        f"{other['model']} computes {other['flops'][0]:.2f} (translation) and {other['flops'][1]:.2f}"
        f" (language model) of the FFN FLOPs of {first['model']}, in {mt:.2f} and {lm:.2f} of its time per"
        f" update and {sentence:.2f} of it per translated sentence: {', '.join(qualities)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    places = "has MODEL/translation, MODEL/language_model"
    parser.add_argument("--runs", type=Path, required=True, help=places)
    parser.add_argument("--models", nargs="+", required=True, help="two at least")
    parser.add_argument("--mt-text", type=Path, required=True, help="folder of {test,test1}.{en,de}")
    args = parser.parse_args()
    rows = [model_row(args.runs, model) for model in args.models]
    said = in_words(*rows[:2])
    signatures = read_json(args.runs / args.models[0] / "translation" / "scores.last.json")["signatures"]
    signatures = {name: signatures[name] for name in METRICS}
    rows += baseline_rows(args.runs, args.mt_text)
    table = markdown(TITLES, map(cells, rows))
    console = Console(width=None if Console().is_terminal else 120)
    console.print(
        Markdown(f"**Held-out results** (two numbers: translation, language model)\n\n{table}\n{said}")
    )
    for name, signature in signatures.items():
        console.print(f"{name}: {signature}", markup=False, highlight=False)
    write_atomically(args.runs / "report.md", f"{table}\n{said}\n")
    write_json(args.runs / "report.json", {"rows": rows, "in_words": said, "signatures": signatures})


if __name__ == "__main__":
    main()
