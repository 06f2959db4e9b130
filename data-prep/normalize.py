"""Print text as training's was normalised: NFC, no invisible characters, every run of whitespace one space.

For what a trained model is to translate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from textio import normalize, read_lines, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="text, plain or .gz, .xz")
    for path in parser.parse_args().files:
        for line in read_lines(path):
            print(normalize(line))


if __name__ == "__main__":
    run(main)
