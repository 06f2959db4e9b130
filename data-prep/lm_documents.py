"""Split documents into train, valid and test for a language model.

In: files of the kinds that documents.py reads. Out: PREFIX.{train,valid,test}, a paragraph a line, an empty
line after each document. Each line is normalised (NFC, invisible characters away, whitespace runs to one
space). Without files of its own for valid and test, a document's split follows from a hash of its text, so
it does not move when other documents come or go. Where that leaves a split empty, documents are so few that
they are cut between paragraphs, into some hundred parts, of which exact shares are held out; otherwise none
is ever cut. Documents seen before, or held out, are dropped.
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
PARTS = 200  # into which too few documents are cut: a choice
Edges = tuple[float, float]  # places in the order of hashes, 0 to 100, below which a document is test, valid


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
    for flag, percent in (("--valid-percent", args.valid_percent), ("--test-percent", args.test_percent)):
        if not 0 < percent < 50:
            raise DataError(f"{flag} must be between 0 and 50, got {percent}")
    split(args)


class Document(NamedTuple):
    text: str
    value: int
    words: int


def place(value: int) -> float:
    return 100 * value / 2**64


def choose(value: int, edges: Edges) -> str:
    if place(value) < edges[0]:
        return "test"
    return "valid" if place(value) < edges[1] else "train"


def parts(paragraphs: list[str], least: int) -> Iterator[list[str]]:
    """Runs of paragraphs with so many words or more, but for the last; with 0 all in one."""
    part: list[str] = []
    words = 0
    for paragraph in paragraphs:
        part.append(paragraph)
        words += paragraph.count(" ") + 1
        if 0 < least <= words:
            yield part
            part, words = [], 0
    if part:
        yield part


def prepare(documents: list[list[str]], detokenize: bool, part_words: int) -> list[Document]:
    done = []
    for lines in documents:
        paragraphs = [text for line in lines if (text := normalize(wikitext(line) if detokenize else line))]
        for part in parts(paragraphs, part_words):
            text = "\n".join(part)
            done.append(Document(text, digest(text), text.count(" ") + len(part)))
    return done


def read(args: argparse.Namespace, part_words: int) -> Iterator[tuple[str, list[Document]]]:
    """Documents, a chunk at a time, and whose file they are from; those of --input cut, or whole with 0."""
    own = {"test": args.test_input, "valid": args.valid_input, "train": args.input}
    for name, paths in own.items():

        def work(chunk: list[list[str]], least: int = part_words if name == "train" else 0) -> list[Document]:
            return prepare(chunk, args.detokenize, least)

        for chunk in in_order(work, in_chunks(read_documents(paths, args.form), CHUNK), args.workers):
            yield name, chunk


class TooFew(DataError):
    """Documents to split; they have so many words."""

    def __init__(self, message: str, words: int) -> None:
        super().__init__(message)
        self.words = words


def split(args: argparse.Namespace) -> None:
    shares = (0 if args.test_input else args.test_percent), (0 if args.valid_input else args.valid_percent)
    try:
        counts = write(args, (shares[0], sum(shares)))
    except TooFew as error:
        if not any(shares):
            raise
        part_words = max(1, error.words // PARTS)
        print(
            f"lm_documents: few documents, so they are cut into parts of {part_words} words or more",
            flush=True,
        )
        counts = write(args, edges_of(args, shares, part_words), part_words)
    report(counts, args.counts)


def edges_of(args: argparse.Namespace, shares: tuple[float, float], part_words: int) -> Edges:
    """Between which lie the exact shares, of one part at least; each part is in memory."""
    of_input = (chunk for name, chunk in read(args, part_words) if name == "train")
    places = sorted({place(part.value) for chunk in of_input for part in chunk})
    test, valid = (max(1, round(share * len(places) / 100)) if share else 0 for share in shares)
    if test + valid >= len(places):
        raise DataError(
            f"{args.input[0]}: {len(places)} different paragraphs are too few to hold some out; give more "
            "text, or files of your own for validation and test"
        )
    return (places[test] if test else 0.0, places[test + valid])


def write(args: argparse.Namespace, edges: Edges, part_words: int = 0) -> Counter[str]:
    """Raises TooFew."""
    counts = Counter({"documents": 0, "too short": 0, "duplicate": 0, "in held-out text": 0})
    held = DigestSet()
    with scratch(Path(args.out_prefix)) as work:
        logs = {name: DigestLog(work / f"{name}.digests") for name in SPLITS}
        with atomic_writers([work / name for name in SPLITS]) as opened:
            files = dict(zip(SPLITS, opened, strict=True))
            for origin, chunk in read(args, part_words):
                values: dict[str, list[int]] = {name: [] for name in SPLITS}
                for document in chunk:
                    counts["documents"] += 1
                    name = choose(document.value, edges) if origin == "train" else origin
                    if document.words < args.min_words:
                        counts["too short"] += 1
                    elif origin != "test" and document.value in held:
                        counts["in held-out text"] += 1
                    else:
                        files[name].write(document.text + "\n\n")
                        values[name].append(document.value)
                        if origin != "train":
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
    return counts


def check_sizes(counts: Counter[str], args: argparse.Namespace) -> None:
    left = sum(counts[name] for name in (*SPLITS, "too short", "in held-out text"))
    counts["duplicate"] = counts["documents"] - left
    for name in SPLITS:
        if not counts[name]:
            message = f"{args.input[0]}: no document is left for {name} ({dict(counts)}); give other text"
            own = {"test": args.test_input, "valid": args.valid_input, "train": []}
            raise TooFew(message, sum(counts[f"{name} words"] for name, files in own.items() if not files))


if __name__ == "__main__":
    run(main)
