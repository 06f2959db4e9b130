"""WMT test sets through sacrebleu, several of them one after the other, as a pair of plain parallel files.

sacrebleu downloads them, checks their MD5, and keeps them in $SACREBLEU (default: ~/.sacrebleu); sets that
lie there already are used. Where there are several references, sacrebleu's choice, and its first.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import sacrebleu.dataset
import sacrebleu.utils
from counts import new_parser, report
from outputs import atomic_writers, check_files
from textio import DataError, read_parallel, run


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--sets", nargs="+", required=True, help="names, as of `sacrebleu --list`")
    parser.add_argument("--langpair", required=True, help="e.g. uk-en")
    parser.add_argument("--source-out", type=Path, required=True)
    parser.add_argument("--target-out", type=Path, required=True)
    args = parser.parse_args()
    check_files([args.source_out, args.target_out, args.counts])
    for name in args.sets:
        if args.langpair not in sacrebleu.utils.get_langpairs_for_testset(name):
            raise DataError(f"--sets: sacrebleu has no {args.langpair} in {name!r}; see sacrebleu --list")
    get(args)


def files(name: str, langpair: str) -> tuple[Path, Path]:
    dataset = sacrebleu.dataset.DATASETS[name]
    try:
        return Path(dataset.get_source_file(langpair)), Path(dataset.get_reference_files(langpair)[0])
    except (SystemExit, Exception) as error:  # sacrebleu and what it calls raise all sorts
        discard(dataset)
        why = "checksum differs" if isinstance(error, SystemExit) else " ".join(str(error).split())
        raise DataError(
            f"cannot get {name} {langpair} from {' '.join(dataset.data)}: {why}; run again"
        ) from None


def discard(dataset: sacrebleu.dataset.base.Dataset) -> None:
    """sacrebleu takes an archive that is there for whole and unpacked, also one that it could not finish."""
    for url in dataset.data:
        Path(dataset._rawdir, dataset._get_tarball_filename(url)).unlink(missing_ok=True)


def get(args: argparse.Namespace) -> None:
    counts: Counter[str] = Counter()
    with atomic_writers([args.source_out, args.target_out]) as (source_out, target_out):
        for name in args.sets:
            for source, target in read_parallel(*files(name, args.langpair)):
                counts[name] += 1
                source_out.write(source + "\n")
                target_out.write(target + "\n")
    report(counts, args.counts)


if __name__ == "__main__":
    run(main)
