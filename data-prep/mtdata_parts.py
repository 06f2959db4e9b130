"""The training corpora of an mtdata recipe, each a pair of plain parallel files, and a list of the sources.

mtdata itself runs as a program in an environment of its own: the versions it asks for are not ours. It keeps
downloads in $MTDATA (default: ~/.mtdata) and finished corpora in FOLDER/mtdata, so a later run goes on there.
Out: FOLDER/parts/DATASET.{SRC,TGT} and, if --dev names one, FOLDER/dev.{SRC,TGT}; FOLDER/parts.txt, the
prefixes of the parts in order; FOLDER/sources.json.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from counts import new_parser, report
from manifest import sha256
from outputs import as_json, check_files, write_bytes
from textio import DataError, read_parallel, run

LICENCE = "the publisher's, see the URL; mtdata records none"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--mtdata", required=True, help="the program")
    parser.add_argument("--recipes", type=Path, required=True, help="YAML")
    parser.add_argument("--recipe", required=True, help="id")
    parser.add_argument("--dev", help="id of one more dataset, for validation")
    parser.add_argument("--skip", nargs="*", default=[], help="dataset ids to leave out, e.g. dead links")
    parser.add_argument("--langs", nargs=2, required=True, metavar=("SRC", "TGT"), help="as the files end")
    parser.add_argument("--iso", nargs=2, required=True, metavar=("SRC", "TGT"), help="as mtdata says")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    check_files([args.folder / "sources.json", args.folder / "parts.txt", args.counts], [args.recipes])
    get(args)


def dataset_ids(recipes: Path, name: str, skip: list[str]) -> list[str]:
    try:
        found = {entry["id"]: entry for entry in yaml.safe_load(recipes.read_text("utf-8"))}
        train = found[name]["train"]
    except KeyError:
        raise DataError(f"{recipes}: no recipe {name!r} with a list 'train'") from None
    except (yaml.YAMLError, AttributeError, TypeError, UnicodeDecodeError, RecursionError):
        raise DataError(f"{recipes}: not a list of mtdata recipes; get it again") from None
    ids = [part.strip() for entry in flat(train) for part in entry.split(",") if part.strip()]
    if unknown := set(skip) - set(ids):
        raise DataError(f"--skip {' '.join(sorted(unknown))}: not in the recipe {name}")
    if not (left := [i for i in ids if i not in skip]):
        raise DataError(f"{recipes}: recipe {name} has no training data left")
    return left


def flat(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [text for part in value for text in flat(part)]


def run_mtdata(args: argparse.Namespace, *words: str) -> str:
    log = args.folder / "mtdata.log"
    with log.open("a", encoding="utf-8") as file:
        try:
            done = subprocess.run([args.mtdata, *words], stdout=subprocess.PIPE, stderr=file, text=True)
        except OSError as error:
            raise DataError(f"--mtdata {args.mtdata}: {error.strerror}") from None
        file.write(done.stdout)
    if done.returncode:
        text = log.read_text("utf-8")
        reasons = re.findall(r"(?:Unable to add|Failed to download) .*", text) or re.findall(
            r".*Error.*", text
        )
        reason = reasons[-1].strip() if reasons else f"exit status {done.returncode}"
        raise DataError(
            f"mtdata {words[0]}: {reason} (log: {log}); run again, or leave the dataset out: --skip"
        )
    return done.stdout


def urls(args: argparse.Namespace) -> dict[str, str]:
    rows = [line.split("\t") for line in run_mtdata(args, "list", "-l", "-".join(args.iso)).splitlines()]
    return {row[0]: row[1] for row in rows if len(row) > 1}


def sides(folder: Path, dataset: str, iso: list[str]) -> tuple[Path, Path]:
    """The two files of a dataset; its id ends with its languages, in any order, perhaps with regions."""
    ends = dataset.split("-")[-2:]
    by_language = {end.split("_")[0]: folder / f"{dataset}.{end}" for end in ends}
    if set(by_language) != set(iso):
        raise DataError(f"{dataset}: languages {'-'.join(ends)}, expected {' and '.join(iso)}")
    return by_language[iso[0]], by_language[iso[1]]


def get(args: argparse.Namespace) -> None:
    ids = dataset_ids(args.recipes, args.recipe, args.skip)
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "mtdata.log").unlink(missing_ok=True)
    known = urls(args)
    own = args.folder / "mtdata"
    words = ["get", "-l", "-".join(args.iso), "-tr", *ids, "-o", str(own), "-j", str(args.jobs), "--fail"]
    run_mtdata(args, *words, *(["-dv", args.dev] if args.dev else []))
    counts: Counter[str] = Counter(datasets=len(ids))
    sources, prefixes = [], []
    for dataset in ids + [args.dev] * bool(args.dev):
        held = dataset == args.dev
        prefix = args.folder / ("dev" if held else f"parts/{dataset}")
        found = sides(own / ("tests" if held else "train-parts"), dataset, args.iso)
        links = [prefix.with_name(f"{prefix.name}.{lang}") for lang in args.langs]
        counts[dataset] = sum(1 for _ in read_parallel(*found))
        for file, link in zip(found, links, strict=True):
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(file, link.parent))
        if not held:
            prefixes.append(f"{prefix}\n")
        sources.append(
            {"task": "wmt23", "source": dataset, "url": known.get(dataset, "see mtdata"), "licence": LICENCE}
            | {"lines": counts[dataset], "sha256": [sha256(file) for file in found]}
        )
    write_bytes(args.folder / "sources.json", as_json(sources))
    write_bytes(args.folder / "parts.txt", "".join(prefixes).encode())
    report(counts, args.counts)


if __name__ == "__main__":
    run(main)
