"""xmoe-threshold CHECKPOINT --data DATA --budget B | --max-loss X: finds t of a trained model.

t is measured on validation data, and a checkpoint written that holds it and that every fairseq command
opens; by the rule that it was trained with, or by another. Each t that is tried is one pass over the
validation set, or over --valid-tokens of it; --per-layer first takes three for each layer.
Beside the new checkpoint lie a table of them all (.md, .json) and a plot (.png).
"""

import argparse
from functools import partial
from pathlib import Path

from fairseq import checkpoint_utils
from fairseq.utils import import_user_module

from xmoe_fairseq.moe.rules import RULES
from xmoe_fairseq.thresholds.checkpoint import check_is_file, open_meter, settings_for, write_checkpoint
from xmoe_fairseq.thresholds.report import check_name, report_of, write_report
from xmoe_fairseq.thresholds.search import Search, equal_loss, same_everywhere
from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.usage import Parser


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "xmoe-threshold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="of a model with --moe-router threshold")
    add("--data", type=Path, required=True, help="folder of data-prep or fairseq-preprocess: valid")
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--budget", type=float, metavar="B",
                     help="experts per token, shared ones included, on average at most")  # fmt: skip
    aim.add_argument("--max-loss", type=float, metavar="X", help="instead: the least experts whose loss "
                     "is at most X bits per token above that of the checkpoint as it is")  # fmt: skip
    add("--moe-threshold-rule", choices=RULES, help="whose t it is (default: the checkpoint's)")
    add("--per-layer", action="store_true", help="a t for each layer, by its effect on the loss")
    add("--output", type=Path, help="checkpoint to write (default: CHECKPOINT with .picked.pt)")
    add("--valid-tokens", type=int, metavar="N", help="of valid, in batches drawn at random (default: all)")
    add("--max-tokens", type=int, help="tokens in a batch (default: the checkpoint's, or 4096)")
    add("--user-dir", help="of a router of your own, as fairseq's commands have it")
    return parser


def main() -> None:
    choose(argument_parser().parse_args())


def choose(args: argparse.Namespace) -> None:
    """Raises UserError."""
    output = check(args)
    import_user_module(args)
    meter = open_meter(args.checkpoint, args.data, args.max_tokens, args.valid_tokens)
    as_it_is, shared = meter.in_use, meter.shared_experts
    least, most = shared + 1, shared + meter.routers[0].limit
    if args.budget is not None and not least <= args.budget <= most:
        may = f"from {least} to {most}, what a token may take"
        raise FlagError(f"--budget must be {may}, got {args.budget:g}")
    start = meter.measure(as_it_is)
    tried_by = meter.by(args.moe_threshold_rule)
    search = Search(tried_by, equal_loss(tried_by) if args.per_layer else same_everywhere(tried_by))
    if args.budget is None:
        chosen = search.smallest(start.bits_per_token + args.max_loss)
    else:  # which is one routed expert at least, and so can be met
        chosen = search.largest(lambda q: q.experts_per_token, args.budget) or search.at(0.0)
    tried = sorted((q for q in search.points.values() if q != chosen), key=lambda q: q.flops)
    rows = {"chosen": chosen, **{f"tried {number}": quality for number, quality in enumerate(tried, 1)}}
    about = {
        "checkpoint": args.checkpoint.name, "budget, experts per token": args.budget,
        "permitted loss, bits per token": args.max_loss,
        "thresholds": "per layer" if args.per_layer else "one for all layers",
        "threshold rule": tried_by.rule.name, "threshold rule as it is": meter.rule.name,
        "validation tokens": args.valid_tokens or "all",
    }  # fmt: skip
    report = report_of(search, about, rows, "as it is", start, partial(meter.seconds, as_it_is))
    state = checkpoint_utils.load_checkpoint_to_cpu(str(args.checkpoint))
    weights = {name: w for name, w in state["model"].items() if ".router.budget." not in name}
    write_checkpoint(output, state, settings_for(chosen.thresholds, tried_by.rule.name), weights)
    write_report(output, report)


def check(args: argparse.Namespace) -> Path:
    """The output. Raises UserError."""
    if args.max_loss is not None and not args.max_loss >= 0:
        raise FlagError(f"--max-loss must be 0 or more bits per token, got {args.max_loss:g}")
    for name, tokens in (("valid", args.valid_tokens), ("max", args.max_tokens)):
        if tokens is not None and tokens < 1:
            raise FlagError(f"--{name}-tokens must be at least 1, got {tokens}")
    check_is_file(args.checkpoint)
    output: Path = args.output or args.checkpoint.with_suffix(".picked.pt")
    if output.is_dir():
        raise FlagError(f"--output {output} is a folder; name a file in it")
    check_name("--output", output, args.checkpoint)
    if not output.parent.is_dir():
        raise FlagError(f"--output: there is no folder {output.parent}")
    if output.exists() and output.samefile(args.checkpoint):
        raise FlagError(
            f"--output {output} is the checkpoint itself, which would be overwritten; name another"
        )
    return output


if __name__ == "__main__":
    main()
