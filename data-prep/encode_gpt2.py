"""As encode_spm.py, with GPT-2's byte-level BPE from its files encoder.json and vocab.bpe.

A piece is written as its number, as fairseq's `--bpe gpt2` reads it. With --dict instead of input and output,
writes the fairseq dictionary of all pieces, for `fairseq-preprocess --srcdict`.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from counts import new_parser
from encode_spm import add_arguments, check, encode
from outputs import check_files, write_bytes
from textio import DataError, run
from train_spm import padding

REMEMBERED = 200_000  # words whose pieces are kept: a choice; fairseq itself keeps all that it has seen


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--encoder-json", type=Path, required=True)
    parser.add_argument("--vocab-bpe", type=Path, required=True)
    parser.add_argument("--dict", type=Path, help="write the dictionary, and no more")
    add_arguments(parser, needed=False)
    args = parser.parse_args()
    if bool(args.dict) == bool(args.input and args.output):
        raise DataError("give --input and --output, or --dict")
    tables = args.encoder_json, args.vocab_bpe
    if args.dict:
        check_files([args.dict], tables)
    else:
        check(args, *tables)
    bpe = load(*tables)
    if args.dict:
        pieces = [str(number) for number in sorted(bpe.encoder.values())]
        pieces += padding(len(pieces))
        write_bytes(args.dict, "".join(f"{piece} 1\n" for piece in pieces).encode())
        return

    def encode_line(line: str) -> list[str]:
        if len(bpe.cache) > REMEMBERED:
            bpe.cache.clear()
        return [str(number) for number in bpe.encode(line)]

    encode(args, encode_line, "<unk>")  # which never occurs: every byte is a piece


def fairseq_bpe() -> Any:
    """fairseq.data.encoders.gpt2_bpe_utils without the package around it, which takes torch and seconds."""
    package = find_spec("fairseq")
    if package is None or not package.submodule_search_locations:
        raise DataError("fairseq not found; run: bash scripts/setup.sh")
    path = Path(package.submodule_search_locations[0], "data", "encoders", "gpt2_bpe_utils.py")
    spec = spec_from_file_location("gpt2_bpe_utils", path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(encoder_json: Path, vocab_bpe: Path) -> Any:
    try:
        bpe = fairseq_bpe().get_encoder(str(encoder_json), str(vocab_bpe))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        raise DataError(f"{encoder_json}, {vocab_bpe}: not GPT-2's encoder.json and vocab.bpe") from None
    spelt = {"".join(pair) for pair in bpe.bpe_ranks} | set(bpe.byte_encoder.values())
    if not isinstance(bpe.encoder, dict) or not spelt <= set(bpe.encoder):
        raise DataError(f"{encoder_json} lacks pieces of {vocab_bpe}; are they of one model, and whole?")
    return bpe


if __name__ == "__main__":
    run(main)
