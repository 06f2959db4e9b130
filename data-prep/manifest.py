"""Write a manifest (JSON) beside prepared data: sources, licences, versions, counts, hashes of the files."""

from __future__ import annotations

import argparse
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from outputs import as_json, check_files, write_bytes
from textio import DataError, read_entries, read_json, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--about", required=True, help="one sentence: what this data is")
    parser.add_argument(
        "--sources", type=Path, nargs="+", required=True, help="JSON, e.g. sample/sources.json"
    )
    parser.add_argument("--task", required=True, help="take the sources whose 'task' is this")
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--packages", nargs="*", default=[], help="record the installed versions of these")
    parser.add_argument("--counts", type=Path, nargs="*", default=[], help="JSON files the steps wrote")
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="files in the manifest's folder")
    args = parser.parse_args()
    write(args)


def sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def package_version(name: str) -> str:
    try:
        return version(name)
    except (PackageNotFoundError, ValueError):
        raise DataError(f"package {name} is not installed; run: bash scripts/setup.sh") from None


def write(args: argparse.Namespace) -> None:
    folder = args.output.parent
    check_files([args.output], [*args.sources, *args.counts, *args.files])
    if wrong := [setting for setting in args.settings if "=" not in setting]:
        raise DataError(f"--settings must be NAME=VALUE, got {wrong[0]}")
    if outside := [path for path in args.files if not path.is_relative_to(folder)]:
        raise DataError(f"--files {outside[0]}: is not in the manifest's folder {folder}")
    if again := [path for path in args.counts if [p.stem for p in args.counts].count(path.stem) > 1]:
        raise DataError(f"--counts: two files are named {again[0].stem}, and one would be lost")
    sources = [s for path in args.sources for s in read_entries(path, "task") if s["task"] == args.task]
    if not sources:
        raise DataError(f"{args.sources[0]}: no source has the task {args.task!r}")
    manifest = {
        "about": args.about,
        "settings": dict(setting.split("=", 1) for setting in args.settings),
        "packages": {name: package_version(name) for name in args.packages},
        "sources": sources,
        "counts": {path.stem: read_json(path) for path in args.counts},
        "sha256": {str(p.relative_to(folder)): sha256(p) for p in sorted(args.files)},
    }
    write_bytes(args.output, as_json(manifest))


if __name__ == "__main__":
    run(main)
