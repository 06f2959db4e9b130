"""What a step counted, on one line for people and as JSON for the manifest."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from outputs import as_json, write_bytes
from textio import DataError

MOST_WORKERS = 1024  # a choice


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the script's docstring as its help, and --counts."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, help="also write the printed counts to this JSON file")
    return parser


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1, help="processes; same result with any (default: 1)")


def check_workers(args: argparse.Namespace) -> None:
    if not 1 <= args.workers <= MOST_WORKERS:  # all are started at once
        raise DataError(f"--workers must be at least 1 and at most {MOST_WORKERS}, got {args.workers}")


def report(counts: Counter[str], path: Path | None) -> None:
    """One line on stdout: 'clean_pairs: read 10, kept 8, empty side 2'; JSON if asked for."""
    print(f"{Path(sys.argv[0]).stem}: " + ", ".join(f"{name} {n}" for name, n in counts.items()), flush=True)
    if path is not None:
        write_bytes(path, as_json(dict(counts)))
