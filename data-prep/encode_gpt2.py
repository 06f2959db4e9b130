"""As encode_spm.py, with GPT-2's byte-level BPE: encoder.json and vocab.bpe, as fairseq's `--bpe gpt2` reads them.

A piece is written as its number, so that fairseq decodes it. With --dict, also writes the fairseq dictionary
of all pieces, for `fairseq-preprocess --srcdict`.
"""

from __future__ import annotations

from pathlib import Path

from counts import new_parser
from encode_spm import add_arguments, check, encode
from fairseq.data.encoders.gpt2_bpe_utils import Encoder, get_encoder
from textio import DataError, run, write_bytes
from train_spm import padding

REMEMBERED = 200_000  # words whose pieces are kept; fairseq's memory of them has no limit of its own


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--encoder-json", type=Path, required=True)
    parser.add_argument("--vocab-bpe", type=Path, required=True)
    parser.add_argument("--dict", type=Path, help="also write the dictionary here")
    add_arguments(parser)
    args = parser.parse_args()
    check(args)
    bpe = load(args.encoder_json, args.vocab_bpe)
    if args.dict:
        pieces = [str(number) for number in sorted(bpe.encoder.values())]
        pieces += padding(len(pieces))
        write_bytes(args.dict, "".join(f"{piece} 1\n" for piece in pieces).encode())

    def encode_line(line: str) -> list[str]:
        if len(bpe.cache) > REMEMBERED:
            bpe.cache.clear()
        return [str(number) for number in bpe.encode(line)]

    encode(args, encode_line, lambda piece: False)  # bytes are pieces, so nothing is unknown


def load(encoder_json: Path, vocab_bpe: Path) -> Encoder:
    try:
        bpe = get_encoder(str(encoder_json), str(vocab_bpe))
    except (ValueError, UnicodeDecodeError):
        raise DataError(f"{encoder_json}, {vocab_bpe}: not GPT-2's encoder.json and vocab.bpe") from None
    spelt = {"".join(pair) for pair in bpe.bpe_ranks} | set(bpe.byte_encoder.values())
    if not isinstance(bpe.encoder, dict) or not spelt <= set(bpe.encoder):
        raise DataError(f"{encoder_json} lacks pieces that {vocab_bpe} makes; are they of one model, and whole?")
    return bpe


if __name__ == "__main__":
    run(main)
