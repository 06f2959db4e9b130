"""How sure a difference in BLEU and chrF++ is: sacreBLEU's paired bootstrap of what score.py has translated.

    python scripts/run.py experiments.significance RUN ... --against MODEL [--split test] --out FILE

Each run of translation against that of MODEL (as the table of compare.sh names it) with the same seed, on the
same 1,000 resamples of the test set: its score with the 95 % interval, the difference, and p, how often
chance alone makes so large a difference (Koehn 2004). The test set is what is resampled: how far seeds differ
is in compare.md. Writes FILE.md, FILE.json.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacrebleu.significance import PairedTest

from experiments.evaluation import METRICS, hypotheses
from experiments.results import lines, publish, read_run
from experiments.runs import Run, alike, row_named, rows_of
from experiments.train import languages
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.errors import UserError

SHOWN = {"bleu": "BLEU", "chrf++": "chrF2++"}  # as sacreBLEU names them


def translations(run: Run, tag: str, split: str, number: int) -> list[str]:
    file = run.folder / f"score.{tag}" / f"{split}.out"
    found = hypotheses(file)
    if len(found) != number:
        raise UserError(f"{file}: holds {len(found)} translations of {number}; score the run again")
    return found


def compare(runs: Sequence[tuple[str, Run]], tag: str, split: str, samples: int) -> list[dict[str, Any]]:
    """Of runs with their rows' names, the reference first, which has no p."""
    data = Path(runs[0][1].about["data"])
    reference = lines(data / "text" / f"{split}.{languages(data / 'bin')[1]}")
    systems = [(name, translations(run, tag, split, len(reference))) for name, run in runs]
    test = PairedTest(systems, {name: METRICS[name] for name in SHOWN}, [reference], "bs", samples)
    _, found = test()
    results = []
    for number, (name, run) in enumerate(runs):
        scores = {}
        for metric, title in SHOWN.items():
            base, own = found[title][0], found[title][number]
            scores[metric] = {
                "score": float(own.score), "interval": float(own.ci),
                "difference": float(own.score - base.score), "p": own.p_value and float(own.p_value),
            }  # fmt: skip
        results.append({"model": name, "seed": run.seed, "run": str(run.folder), **scores})
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    titles = [title for name in ("BLEU", "chrF++") for title in (name, "difference", "p")]
    body = []
    for one in results:
        cells = [one["model"], str(one["seed"])]
        for score in (one[metric] for metric in SHOWN):
            is_other = score["p"] is not None
            cells.append(f"{score['score']:.2f} ± {score['interval']:.2f}")
            cells += [f"{score['difference']:+.2f}", f"{score['p']:.3f}"] if is_other else ["-", "-"]
        body.append(cells)
    return markdown(["model", "seed", *titles], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN")
    add("--against", required=True, metavar="MODEL")
    add("--split", default="test")
    add("--scores", default="best", metavar="TAG", help="best, averageN, ...: score.TAG/SPLIT.out")
    add("--samples", type=int, default=1000, help="resamples (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="FILE", help="to write, without .md")
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    rows = rows_of(alike([Run(folder, read_run(folder), {}) for folder in args.runs]))
    by_seed: dict[int, list[tuple[str, Run]]] = defaultdict(list)
    for run in row_named("--against", args.against, rows):
        by_seed[run.seed].append((args.against, run))
    for name, members in rows.items():
        for run in members if name != args.against else ():
            if run.seed in by_seed:  # else there is no pair
                by_seed[run.seed].append((name, run))
    results = [
        one for runs in by_seed.values() for one in compare(runs, args.scores, args.split, args.samples)
    ]
    publish(args.out, table(results), results)


if __name__ == "__main__":
    main()
