"""Split documents into train, valid and test for a language model; a document is never cut.

In: files of the kinds that documents.py reads. Out: PREFIX.{train,valid,test}, a paragraph a line, an empty
line after each document. Each line is normalised (NFC, invisible characters away, whitespace runs to one
space). Without files of its own for valid and test, a document's split follows from a hash of its text, so
it does not move when other documents come or go. Documents seen before, or held out, are dropped.
Memory: a few hundred documents, a bit for each further one, and 14 to 27 bytes for each held-out one; on the
disk, what is left waits beside the output until the duplicates are known.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from counts import add_workers, check_workers, new_parser, report
from detokenize import wikitext
from digests import DigestLog, DigestSet, copy_first, digest
from documents import FORMS, read_documents
from outputs import atomic_writers, check_files, scratch
from parallel import in_order
from textio import DataError, in_chunks, normalize, run

SPLITS = ("test", "valid", "train")  # what is held out must be known before train is read
CHUNK = 100  # documents given to a process at once


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files, in order")
    parser.add_argument("--valid-input", type=Path, nargs="*", default=[], help="files that are all of valid")
    parser.add_argument("--test-input", type=Path, nargs="*", default=[], help="files that are all of test")
    parser.add_argument("--out-prefix", type=Path, required=True)
    parser.add_argument("--valid-percent", type=float, default=5.0, help="of documents (default: 5)")
    parser.add_argument("--test-percent", type=float, default=5.0, help="of documents (default: 5)")
    parser.add_argument(
        "--min-words", type=int, default=1, help="drop documents with fewer words (default: %(default)s)"
    )
    forms = "; ".join(f"{name}: {what}" for name, what in FORMS.items())
    parser.add_argument("--form", choices=FORMS, default="documents", help=f"{forms} (default: documents)")
    parser.add_argument("--detokenize", action="store_true", help="undo WikiText's tokenisation")
    add_workers(parser)
    args = parser.parse_args()
    check_workers(args)
    outputs = [Path(f"{args.out_prefix}.{name}") for name in SPLITS]
    check_files([*outputs, args.counts], [*args.input, *args.valid_input, *args.test_input])
    if bool(args.valid_input) != bool(args.test_input):
        raise DataError("--valid-input and --test-input: give both or neither")
    for flag, percent in (("--valid-percent", args.valid_percent), ("--test-percent", args.test_percent)):
        if not 0 < percent < 50:
            raise DataError(f"{flag} must be between 0 and 50, got {percent}")
    split(args)


class Document(NamedTuple):
    text: str
    value: int
    words: int


def choose(value: int, valid_percent: float, test_percent: float) -> str:
    place = 100 * value / 2**64
    if place < test_percent:
        return "test"
    return "valid" if place < test_percent + valid_percent else "train"


def prepare(documents: list[list[str]], detokenize: bool) -> list[Document]:
    done = []
    for lines in documents:
        paragraphs = [text for line in lines if (text := normalize(wikitext(line) if detokenize else line))]
        text = "\n".join(paragraphs)
        if text:
            done.append(Document(text, digest(text), text.count(" ") + len(paragraphs)))
    return done


def read(args: argparse.Namespace) -> Iterator[tuple[str | None, list[Document]]]:
    """Documents, a chunk at a time, with their split if they come from its own file."""

    def work(chunk: list[list[str]]) -> list[Document]:
        return prepare(chunk, args.detokenize)

    own = {"test": args.test_input, "valid": args.valid_input, "train": args.input}
    for name, paths in own.items():
        for chunk in in_order(work, in_chunks(read_documents(paths, args.form), CHUNK), args.workers):
            yield (name if args.valid_input else None), chunk


def split(args: argparse.Namespace) -> None:
    counts = Counter({"documents": 0, "too short": 0, "duplicate": 0, "in held-out text": 0})
    held = DigestSet()
    with scratch(Path(args.out_prefix)) as work:
        logs = {name: DigestLog(work / f"{name}.digests") for name in SPLITS}
        with atomic_writers([work / name for name in SPLITS]) as opened:
            files = dict(zip(SPLITS, opened, strict=True))
            for own, chunk in read(args):
                values: dict[str, list[int]] = {name: [] for name in SPLITS}
                for document in chunk:
                    counts["documents"] += 1
                    name = own or choose(document.value, args.valid_percent, args.test_percent)
                    if document.words < args.min_words:
                        counts["too short"] += 1
                    elif own and name != "test" and document.value in held:
                        counts["in held-out text"] += 1
                    else:
                        files[name].write(document.text + "\n\n")
                        values[name].append(document.value)
                        if own and name != "train":
                            held.add(document.value)
                for name, digests in values.items():
                    logs[name].add(digests)
        with atomic_writers([Path(f"{args.out_prefix}.{name}") for name in SPLITS]) as opened:
            for name, file in zip(SPLITS, opened, strict=True):
                counts.update({name: 0, f"{name} paragraphs": 0, f"{name} words": 0})
                for line in copy_first(work / name, file, logs[name].repeated(), end="\n"):
                    if line == "\n":
                        counts[name] += 1
                    else:
                        counts[f"{name} paragraphs"] += 1
                        counts[f"{name} words"] += line.count(" ") + 1
            check_sizes(counts, args)
    report(counts, args.counts)


def check_sizes(counts: Counter[str], args: argparse.Namespace) -> None:
    left = sum(counts[name] for name in (*SPLITS, "too short", "in held-out text"))
    counts["duplicate"] = counts["documents"] - left
    for name in SPLITS:
        if not counts[name]:
            raise DataError(
                f"{args.input[0]}: no document falls into {name} ({counts['documents']} "
                "read); give more documents or a larger share"
            )


if __name__ == "__main__":
    run(main)
