"""Train a sentencepiece model on one file or more (joint if they are in two languages).

Deterministic: one thread, a fixed seed, and no paths inside the model, so the same text gives the same
bytes. No text normalisation inside (ours is done, see textio.normalize), so decoding gives the text back.
The model has no <s>, <pad> or </s>: fairseq adds its own.

Also writes PREFIX.dict.txt, the fairseq dictionary of every piece, for `fairseq-preprocess --srcdict`.
"""

from __future__ import annotations

import argparse
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from counts import new_parser, report
from outputs import atomic_files, check_files
from textio import DataError, read_lines, run

# Why: see above. Ids of -1: no such piece.
FIXED: dict[str, Any] = {
    **{"normalization_rule_name": "identity", "shuffle_input_sentence": True, "num_threads": 1},
    **{"unk_id": 0, "bos_id": -1, "eos_id": -1, "pad_id": -1, "minloglevel": 2},
}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--model-prefix", type=Path, required=True, help="PREFIX.model, PREFIX.dict.txt")
    parser.add_argument(
        "--vocab-size",
        type=number_or_auto,
        default=4000,
        help="pieces, <unk> included; auto: as many as fit the text, see fitting_size (default: %(default)s)",
    )
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=1.0,
        help="share of characters with a piece; 0.9995 for Chinese (default: %(default)s)",
    )
    parser.add_argument(
        "--byte-fallback",
        action="store_true",
        help="spell unknown characters as bytes (256 pieces). For language models, so that "
        "every character counts in the perplexity; not for translation, where fairseq's "
        "detokeniser would print bytes as <0xE2>",
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        default=10_000_000,
        help="train on a random sample of so many lines (default: %(default)s)",
    )
    parser.add_argument(
        "--padding-factor",
        type=int,
        default=8,
        help="fill the dictionary to a multiple, as fairseq does (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    check(args)
    train(args)


def number_or_auto(text: str) -> int | None:
    return None if text == "auto" else int(text)


def check(args: argparse.Namespace) -> None:
    check_files([*output_names(args), args.counts], args.input)
    if not 0 < args.character_coverage <= 1:
        raise DataError(f"--character-coverage must be in (0, 1], got {args.character_coverage}")
    # the least and the most are sentencepiece's own
    for name, least in (("vocab_size", 2), ("padding_factor", 1), ("seed", 0), ("max_sentences", 101)):
        value, most = getattr(args, name), 65_536 if name == "padding_factor" else 2**31 - 1
        if value is not None and not least <= value <= most:
            flag = f"--{name.replace('_', '-')}"
            raise DataError(f"{flag} must be at least {least} and at most {most}, got {value}")


def output_names(args: argparse.Namespace) -> list[Path]:
    return [Path(f"{args.model_prefix}.{kind}") for kind in ("model", "dict.txt")]


def train(args: argparse.Namespace) -> None:
    counts = Counter(lines=0)
    if auto := args.vocab_size is None:
        args.vocab_size = fitting_size(args)
    try:
        model = learn(args, counts)
    except DataError as error:
        most = re.search(r"too high .* <= (\d+)", str(error))
        if not (auto and most):
            raise
        args.vocab_size, counts = int(most[1]), Counter(lines=0)
        model = learn(args, counts)
    pieces = dictionary(model, args.padding_factor)
    counts["pieces"] = args.vocab_size
    counts["dictionary"] = len(pieces)
    with atomic_files(output_names(args)) as (model_out, dict_out):
        model_out.write(model)
        dict_out.write("".join(f"{piece} 1\n" for piece in pieces).encode())
    report(counts, args.counts)


def fitting_size(args: argparse.Namespace) -> int:
    """Grows with the root of the text, as distinct words do (Heaps' law): 4,000 for 2.8 million characters.

    At least twice the distinct characters, so that there are pieces of several; else 32,000 at most.
    """
    characters = Counter[str]()
    for path in args.input:
        for line in read_lines(path):
            characters.update(line)
    fits = max(min(32_000, int(2.4 * math.sqrt(characters.total()))), 2 * len(characters), 2)
    return fits + (256 if args.byte_fallback else 0)


def learn(args: argparse.Namespace, counts: Counter[str]) -> bytes:
    """The model; counts the lines that it is learnt from."""
    unreadable: list[DataError | OSError] = []  # sentencepiece would report it as an error of its own

    def lines() -> Iterator[str]:
        try:
            for path in args.input:
                for line in read_lines(path):
                    if line:
                        counts["lines"] += 1
                        yield line
        except (DataError, OSError) as error:
            unreadable.append(error)

    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(args.seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            vocab_size=args.vocab_size,
            model_type=args.model_type,
            character_coverage=args.character_coverage,
            byte_fallback=args.byte_fallback,
            input_sentence_size=args.max_sentences,
            **FIXED,
        )
    except RuntimeError as error:
        if not unreadable and counts["lines"]:
            # sentencepiece's message ends with its rule, e.g. "Vocabulary size too high (4000). ... <= 912."
            raise DataError(f"--vocab-size {args.vocab_size}: {str(error).split('] ')[-1].strip()}") from None
    if unreadable:
        raise unreadable[0]
    if not counts["lines"]:
        raise DataError(f"{args.input[0]}: empty lines only; expected text")
    return model.getvalue()


def dictionary(model: bytes, padding_factor: int) -> list[str]:
    """Every piece but <unk>, which fairseq has; fairseq's four special symbols count in the multiple."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(i) for i in ids if not processor.is_unknown(i)]
    return pieces + padding(len(pieces), padding_factor)


def padding(pieces: int, factor: int = 8) -> list[str]:
    return [f"madeupword{i:04d}" for i in range(-(pieces + 4) % factor)]


if __name__ == "__main__":
    run(main)
