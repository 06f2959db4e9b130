"""Note the text files that a language model is made from: paths, sizes, SHA-256, for the manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from manifest import sha256
from outputs import as_json, check_files, write_bytes
from textio import DataError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="of all files; without it each is called as it is named here"
    )
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="in the folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON, for manifest.py --sources")
    args = parser.parse_args()
    if not args.files:
        raise DataError(
            f"{args.folder or '--files'}: no .txt, .jsonl, .json (plain or .gz, .xz) or .parquet in it"
        )
    check_files([args.output], args.files)
    folder = args.folder or Path()
    if outside := [path for path in args.files if args.folder and not path.is_relative_to(folder)]:
        raise DataError(f"--files {outside[0]}: is not in --folder {folder}")
    hashes = {str(path.relative_to(folder) if args.folder else path): sha256(path) for path in args.files}
    source = {
        "task": "folder",
        "source": folder.name or "own files",
        "licence": "not recorded",
        "sha256": hashes,
    }
    write_bytes(args.output, as_json([source]))


if __name__ == "__main__":
    run(main)
