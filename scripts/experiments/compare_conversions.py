"""One Markdown table of what scripts/dense_to_sparse.sh has made: a row for each way to a sparse model.

    python scripts/run.py experiments.compare_conversions OUT WAY ... --last UPDATES

Further training; experts per token, FLOPs of the MoE layers over those of the dense FFNs, and scores, on test
sets; how many times as fast it is, where that was timed (benchmark_decoding.sh).
"""

import argparse
from pathlib import Path

from experiments.results import publish, read_json
from xmoe_fairseq.tables import markdown

PENALTIES = ("hoyer", "l1")  # of which a dense model has its
SHOWN = ("perplexity", "bleu", "chrf", "chrf++")
TIMED = (("decoding", 1), ("scoring", 64))  # what, and at which batch
IN_PARTS = "all of it, in parts"
Row = dict[str, str]


def run_row(out: Path, run: str, last: int) -> Row:
    """Of a model that nothing was done to after its training."""
    if run == "split":
        about = {"way": "t = 1", "trained further": IN_PARTS, **costs(out / run / "scores.last.json")}
    elif run == "dense":
        about = {"way": run}
    else:
        about = {"way": f"dense after {run}", "trained further": anew(last)}
    return about | scores(out, out / run, "last")


def way_row(out: Path, way: str, last: int) -> Row:
    return {
        "way": way,
        "trained further": training(out, way, last),
        **costs(out / "dense" / f"scores.{way}.json"),
        **scores(out, out / "dense", way),
        **times(out / "times" / way / "benchmark.json"),
    }


def costs(path: Path) -> Row:
    splits = read_json(path)["splits"]
    sides = next(iter(splits.values()))["routing"].values()  # of the first set; the encoder's comes first
    return {
        "experts": " and ".join(f"{side['experts']:.1f}" for side in sides),
        "FLOPs": " and ".join(f"{side['flops']:.2f}" for side in sides),
    }


def anew(last: int) -> str:
    return f"the last {last:,} updates, anew"


def training(out: Path, way: str, last: int) -> str:
    parts = {*way.split("+")}
    report = out / way / "begin.json" if "trained" in parts else out / f"{way}.json"  # of xmoe-convert
    if "split" in parts:
        return IN_PARTS + f"; t steered in the last {last:,} updates" * ("trained" in parts)
    updates = read_json(report)["about"]["fine-tuning updates"] if report.exists() else 0
    again = [anew(last)] if parts & {*PENALTIES, "trained"} else []
    return " + ".join([*again, *([f"{updates:,} updates"] if updates else [])])


def scores(out: Path, run: Path, tag: str) -> Row:
    """On the test sets, as score.py found them, and how far from the dense model's."""
    base = read_json(out / "dense" / "scores.last.json")["splits"]
    found = {}
    for split, one in read_json(run / f"scores.{tag}.json")["splits"].items():
        for key in (key for key in SHOWN if key in one):
            more = one[key] / base[split][key] - 1 if key == "perplexity" else one[key] - base[split][key]
            change = f" ({more:+.1%})" if key == "perplexity" else f" ({more:+.2f})"
            found[f"{split} {key}"] = f"{one[key]:.2f}" + change * bool(more)
    return found


def times(path: Path) -> Row:
    rows = read_json(path)["rows"] if path.exists() else []
    return {
        f"{what}, batch {batch}: times as fast": row["times as fast"]
        for what, batch in TIMED for row in rows if (row["what"], row["batch"]) == (what, batch)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of dense_to_sparse.sh")
    parser.add_argument("ways", nargs="+")
    last = "updates that penalties and `trained` make in the place of the dense model's last"
    parser.add_argument("--last", type=int, required=True, help=last)
    args = parser.parse_args()
    parts = {part for way in args.ways for part in way.split("+")}
    runs = ("dense", *(run for run in (*PENALTIES, "split") if run in parts))
    rows = [run_row(args.out, run, args.last) for run in runs]
    rows += [way_row(args.out, way, args.last) for way in args.ways]
    titles = [
        *dict.fromkeys(name for row in rows for name in ("way", "trained further", "experts", "FLOPs", *row))
    ]
    table = markdown(titles, [[row.get(title, "") for title in titles] for row in rows])
    publish(args.out / "ways", table, rows)


if __name__ == "__main__":
    main()
