"""Parquet files of a data set on the Hugging Face hub, at a pinned revision, each checked by its SHA-256.

They come into FOLDER under their paths on the hub; a later run goes on where an earlier one stopped. Out
also: FOLDER/files.txt, the paths in order, and FOLDER/sources.json. $HF_ENDPOINT names another server.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections import Counter
from pathlib import Path

from counts import new_parser, report
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars
from manifest import sha256
from outputs import as_json, check_files, write_bytes
from textio import DataError, run


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--repo", required=True, help="OWNER/NAME")
    parser.add_argument("--revision", required=True, help="commit, or a ref, which is then resolved to one")
    parser.add_argument("--patterns", nargs="+", required=True, help="e.g. 'plain_text/*.parquet'")
    parser.add_argument(
        "--first", type=int, default=0, help="so many files of each pattern (default: 0 = all)"
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--task", required=True, help="for sources.json")
    parser.add_argument("--licence", required=True, help="for sources.json")
    parser.add_argument("--workers", type=int, default=1, help="downloads at the same time (default: 1)")
    args = parser.parse_args()
    check_files([args.folder / "sources.json", args.folder / "files.txt", args.counts])
    if args.first < 0:
        raise DataError(f"--first must be at least 0, got {args.first}")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        get(args)
    except DataError:
        raise
    except Exception as error:  # the hub's client, and what it calls, raise all sorts
        place = f"{constants.ENDPOINT}/datasets/{args.repo}"
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"cannot get {place}: {why}; what has come is kept, run again") from None


def get(args: argparse.Namespace) -> None:
    api = HfApi()
    commit = api.dataset_info(args.repo, revision=args.revision).sha
    tree = api.list_repo_tree(args.repo, repo_type="dataset", revision=commit, recursive=True)
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    chosen = [path for pattern in args.patterns for path in choose(sorted(remote), pattern, args.first)]
    snapshot_download(
        args.repo,
        repo_type="dataset",
        revision=commit,
        allow_patterns=chosen,
        local_dir=args.folder,
        max_workers=args.workers,
    )
    counts = Counter(files=len(chosen), bytes=0)
    source = {"task": args.task, "source": args.repo, "revision": commit, "licence": args.licence}
    source |= {"url": f"https://huggingface.co/datasets/{args.repo}", "sha256": (hashes := {})}
    for path in chosen:
        file, entry = args.folder / path, remote[path]
        hashes[path] = sha256(file)
        if file.stat().st_size != entry.size or (entry.lfs and entry.lfs.sha256 != hashes[path]):
            file.unlink()
            raise DataError(f"{file}: not what the hub has (size or SHA-256); it is removed, run again")
        counts["bytes"] += entry.size
    write_bytes(args.folder / "sources.json", as_json([source]))
    write_bytes(args.folder / "files.txt", "".join(f"{args.folder / path}\n" for path in chosen).encode())
    report(counts, args.counts)


def choose(paths: list[str], pattern: str, first: int) -> list[str]:
    found = fnmatch.filter(paths, pattern)
    if not found:
        raise DataError(f"--patterns {pattern}: no such file in the repository")
    return found[:first] if first else found


if __name__ == "__main__":
    run(main)
