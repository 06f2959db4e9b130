"""xmoe-convert DENSE SPARSE --split N --calibration DATA: makes a trained dense fairseq Transformer sparse.

Every FFN is cut into N experts; a router, fitted on DATA, ranks them by what they contribute to a token. With
all experts (t = 1) the outputs are those of the dense model. t is then set for a budget of FLOPs.
"""

import argparse
from pathlib import Path

from xmoe_fairseq.convert.dense import ConvertError
from xmoe_fairseq.convert.finetune import TUNED
from xmoe_fairseq.convert.grouping import GROUPINGS
from xmoe_fairseq.thresholds.report import check_name
from xmoe_fairseq_compat.errors import flag
from xmoe_fairseq_compat.usage import Parser


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="xmoe-convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dense", type=Path, help="checkpoint of fairseq's transformer or transformer_lm")
    add("sparse", type=Path, help="checkpoint to write; must not exist yet. A report is written beside it")
    add("--split", type=int, required=True, help="experts per layer, such as 8, 16, 32; must divide the FFN")
    add(
        "--calibration",
        type=Path,
        required=True,
        help="folder of data-prep or fairseq-preprocess: train, valid",
    )
    add("--calibration-tokens", type=int, default=200_000, help="of train (default: %(default)s)")
    add("--valid-tokens", type=int, default=20_000, help="of valid, to choose t (default: %(default)s)")
    add("--max-tokens", type=int, default=2048, help="tokens in a batch (default: %(default)s)")
    add("--grouping", choices=GROUPINGS, default=GROUPINGS[0], help="of neurons (default: %(default)s)")
    add("--no-moe-encoder", action="store_true", help="keep the encoder dense")
    add("--no-moe-decoder", action="store_true", help="keep the decoder dense")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument(
        "--budget", type=float, default=0.25, help="FLOPs over the dense FFNs' (default: %(default)s)"
    )
    aim.add_argument("--max-loss", type=float, help="instead: nats per token that the loss may rise by")
    add("--per-layer", action="store_true", help="a t for each layer, by how much the loss minds it")
    add("--finetune-updates", type=int, default=0, help="updates of the MoE layers (default: none)")
    add(
        "--finetune",
        choices=TUNED,
        default="all",
        help="the router, or also the experts (default: %(default)s)",
    )
    add("--finetune-lr", type=float, default=5e-4, help="of Adam, falling to 0 (default: %(default)s)")
    add("--seed", type=int, default=1, help="default: %(default)s")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ConvertError or FlagError."""
    if args.sparse.exists():
        raise ConvertError(f"{args.sparse} exists already")
    check_name("SPARSE", args.sparse)
    for name in ("calibration_tokens", "valid_tokens", "max_tokens"):
        if getattr(args, name) < 1:
            raise ConvertError(f"{flag(name)} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.budget <= 1:
        raise ConvertError(f"--budget must be in (0, 1], got {args.budget}")
    if args.max_loss is not None and not args.max_loss > 0:
        raise ConvertError(f"--max-loss must be above 0, got {args.max_loss}")
    if args.finetune_updates < 0 or not args.finetune_lr > 0:
        raise ConvertError("--finetune-updates must be 0 or more and --finetune-lr above 0, "
                           f"got {args.finetune_updates} and {args.finetune_lr}")  # fmt: skip
