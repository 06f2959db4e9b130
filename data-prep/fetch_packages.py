"""Download the Debian or Ubuntu packages of a list and unpack each into a folder; nothing is installed.

Out: FOLDER/NAME_VERSION for each package, FOLDER/apt with the indexes, and a JSON file that names the
packages, their versions, checksums, licences and folders. A package in place is not downloaded again.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from apt import Apt, Package
from counts import new_parser, report
from languages import language
from licences import licences
from outputs import as_json, check_files, write_bytes
from textio import DataError, read_lines, run

APT_NAMES = {"zh": "zh_CN"}  # of description indexes


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--list", type=Path, required=True, help="e.g. packages/mt.txt, which says its form")
    parser.add_argument("--tiers", nargs="+", required=True, help="take the lines of these tiers")
    parser.add_argument("--lang", help="the language beside English, for a list with languages")
    parser.add_argument("--task", choices=["mt", "lm"], required=True, help="noted in the JSON file")
    parser.add_argument("--folder", type=Path, required=True, help="may be shared by several corpora")
    parser.add_argument("--sources-out", type=Path, required=True, help="the JSON file")
    parser.add_argument(
        "--without", nargs="*", default=[], help="packages to leave out, as the list names them"
    )
    parser.add_argument("--refresh", action="store_true", help="get the package indexes anew")
    args = parser.parse_args()
    check_files([args.sources_out, args.counts], [args.list])
    if args.lang:
        language(args.lang)  # known, or an error
    fetch(args)


def wanted(args: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Line number and package (or alternatives) of the lines that tier and language choose; each once."""
    seen = set()
    for number, line in enumerate(read_lines(args.list), 1):
        cells = line.split()
        if not cells or line.startswith("#"):
            continue
        if len(cells) < (3 if args.lang else 2):
            raise DataError(
                f"{args.list}:{number}: {len(cells)} columns; the file's first lines say its form"
            )
        tier, name = cells[0], cells[2 if args.lang else 1]
        if args.lang:
            if cells[1] != "*" and args.lang not in cells[1].split(","):
                continue
            name = name.replace("{lang}", language(args.lang).in_packages)
        if tier in args.tiers and name not in seen and not {name, *name.split("|")} & set(args.without):
            seen.add(name)
            yield number, name


def choose(apt: Apt, args: argparse.Namespace) -> list[Package]:
    specs = list(wanted(args))
    if not specs:
        raise DataError(
            f"{args.list}: no package for --tiers {' '.join(args.tiers)}; see the list's first column"
        )
    offered = apt.find([name for _, spec in specs for name in spec.split("|")])
    chosen = []
    for number, spec in specs:
        package = next((offered[name] for name in spec.split("|") if name in offered), None)
        if package is None:
            raise DataError(
                f"{args.list}:{number}: the system's package sources have no {spec.replace('|', ' or ')}; "
                f"leave it out with --without {spec.split('|')[0]}"
            )
        chosen.append(package)
    return chosen


def fetch(args: argparse.Namespace) -> None:
    languages = ["en", APT_NAMES.get(args.lang, args.lang)] if args.lang else ["en"]
    apt = Apt(args.folder.absolute() / "-".join(["apt", *languages]), languages)
    apt.update(args.refresh)
    counts = Counter({"packages": 0, "downloaded": 0, "bytes": 0})
    packages = choose(apt, args)
    for number, package in enumerate(packages, 1):
        folder = args.folder.absolute() / folder_name(package)
        counts["packages"] += 1
        counts["bytes"] += package.bytes
        if not folder.is_dir():
            print(f"{number}/{len(packages)} {folder.name}, {package.bytes / 1e6:.1f} MB", flush=True)
            apt.unpack(package, folder)
            counts["downloaded"] += 1
    text = as_json(describe(packages, apt, args))
    # What is already so is left alone, so that the next steps know that they are up to date.
    if not args.sources_out.exists() or args.sources_out.read_bytes() != text:
        write_bytes(args.sources_out, text)
    report(counts, args.counts)


def describe(packages: list[Package], apt: Apt, args: argparse.Namespace) -> list[dict[str, object]]:
    """The packages, and the indexes, which hold the packages' descriptions."""
    found = {package.name: licences(args.folder / folder_name(package), package.name) for package in packages}
    by_source = {package.source: found[package.name] for package in packages if found[package.name]}
    entries: list[dict[str, object]] = []
    for package in packages:  # some have their copyright file in a sister package
        licence = found[package.name] or by_source.get(package.source) or "see its debian/copyright"
        common = {"task": args.task, "folder": folder_name(package), **asdict(package)}
        entries.append({**common, "licence": licence})
    indexes = {"folder": str(apt.lists.relative_to(args.folder.absolute())), "name": "descriptions"}
    return [*entries, {"task": args.task, **indexes, "licence": "of each, that of its package"}]


def folder_name(package: Package) -> str:
    return f"{package.name}_{package.version}"


if __name__ == "__main__":
    run(main)
