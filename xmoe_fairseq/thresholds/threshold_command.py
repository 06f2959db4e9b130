"""xmoe-threshold CHECKPOINT --data DATA --budget B | --max-loss X: finds t of a trained model.

t is measured on validation data, and a checkpoint written that holds it and that every fairseq command
opens. Each t that is tried is one pass over the validation set. Beside the new checkpoint lie a table of them
all (.md, .json) and a plot (.png).
"""

import argparse
from pathlib import Path

from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.usage import Parser


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="xmoe-threshold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="of a model with --moe-router threshold")
    add("--data", type=Path, required=True, help="folder of data-prep or fairseq-preprocess: valid")
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--budget", type=float, metavar="B", help="experts per token, on average at most")
    aim.add_argument("--max-loss", type=float, metavar="X", help="instead: the least experts whose loss "
                     "is at most X bits per token above that of the checkpoint as it is")  # fmt: skip
    add("--per-layer", action="store_true", help="each layer its own t: all take equally many experts")
    add("--output", type=Path, help="checkpoint to write (default: CHECKPOINT with .picked.pt)")
    add("--max-tokens", type=int, help="tokens in a batch (default: the checkpoint's, or 4096)")
    return parser


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    args.output = args.output or args.checkpoint.with_suffix(".picked.pt")
    try:
        check(args)
        from xmoe_fairseq.thresholds.choose import choose  # takes seconds, for which --help need not wait

        choose(args)
    except (UserError, OSError, RuntimeError) as error:
        parser.exit(1, f"xmoe-threshold: {str(error).splitlines()[0]}\n")


def check(args: argparse.Namespace) -> None:
    """Raises FlagError."""
    if args.max_loss is not None and not args.max_loss >= 0:
        raise FlagError(f"--max-loss must be 0 or more bits per token, got {args.max_loss:g}")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise FlagError(f"--max-tokens must be at least 1, got {args.max_tokens}")


if __name__ == "__main__":
    main()
