"""xmoe-convert DENSE SPARSE --split N --calibration DATA: makes a trained dense fairseq Transformer sparse.

Every FFN is cut into N experts; a router, fitted on DATA, ranks them by what they contribute to a token. With
all experts (t = 1) the outputs are those of the dense model. t is then set for a budget of FLOPs.

xmoe-convert DENSE SPARSE --upcycle N --split G: makes it larger, to be trained on by fairseq-train. Every FFN
becomes N copies, each cut into G experts; a token takes one copy, so the outputs are the dense model's.
"""

import argparse
import math
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from xmoe_fairseq.batches import Batches, binarised_folders
from xmoe_fairseq.convert import models
from xmoe_fairseq.convert.calibrate import calibrate
from xmoe_fairseq.convert.ffn import FeedForward, feed_forwards
from xmoe_fairseq.convert.finetune import LOSSES, TUNED, distillation, finetune, task_loss
from xmoe_fairseq.convert.grouping import GROUPINGS
from xmoe_fairseq.convert.models import Dense
from xmoe_fairseq.convert.upcycle import add_flags, check_upcycling, upcycle
from xmoe_fairseq.moe.records import fix_thresholds
from xmoe_fairseq.moe.rules import RULES, rule_named
from xmoe_fairseq.thresholds.checkpoint import settings_for
from xmoe_fairseq.thresholds.measure import Meter, Quality, ffn_seconds, measure_dense
from xmoe_fairseq.thresholds.report import check_name, report_of
from xmoe_fairseq.thresholds.search import Search, equal_loss, same_everywhere
from xmoe_fairseq_compat.errors import FlagError, flag
from xmoe_fairseq_compat.usage import Parser

# Choices:
BUDGETS = (0.15, 0.25, 0.5, 1.0)  # in the table, as far as they can be met
PRECISION = 1 / 128  # of the search for t


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser("xmoe-convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dense", type=Path, help="checkpoint of fairseq's transformer or transformer_lm")
    add("sparse", type=Path, help="checkpoint to write; must not exist yet. A report is written beside it")
    add("--split", type=int, required=True,
        help="experts that an FFN is cut into, such as 8, 16, 32; must divide it")  # fmt: skip
    add("--shared", type=int, default=0, metavar="n", help="of these experts compute every token: the most "
        "often active neurons (default: none)")  # fmt: skip
    add("--moe-freq", type=int, default=1, metavar="N", help="only every Nth layer (default: %(default)s)")
    add("--calibration", type=Path, metavar="DATA", help="folder of data-prep or fairseq-preprocess: train, "
        "valid (default, of --upcycle alone: what DENSE was trained on)")  # fmt: skip
    add("--calibration-tokens", type=int, default=200_000, help="of train (default: %(default)s)")
    add("--valid-tokens", type=int, default=20_000, help="of valid, to choose t (default: %(default)s)")
    add("--max-tokens", type=int, default=2048, help="tokens in a batch (default: %(default)s)")
    add("--grouping", choices=GROUPINGS, default=GROUPINGS[0], help="of neurons (default: %(default)s)")
    add("--router-hidden-dim", type=int, default=0, metavar="H", help="hidden units of a router, which cost "
        "FLOPs too (--moe-router-hidden-dim; default: none, linear)")  # fmt: skip
    add("--no-moe-encoder", action="store_true", help="keep the encoder dense")
    add("--no-moe-decoder", action="store_true", help="keep the decoder dense")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument("--budget", type=float, default=0.25, metavar="B",
                     help="FLOPs over the dense FFNs' (default: %(default)s)")  # fmt: skip
    aim.add_argument("--max-loss", type=float, metavar="X",
                     help="instead: nats per token that the loss may rise by")  # fmt: skip
    add("--moe-threshold-rule", choices=RULES, default="mass", help="whose t it is (default: %(default)s)")
    add("--per-layer", action="store_true", help="a t for each layer, by its effect on the loss")
    add("--finetune-updates", type=int, default=0, help="updates of the MoE layers (default: none)")
    add("--finetune", choices=TUNED, default="all",
        help="the router, or also the experts (default: %(default)s)")  # fmt: skip
    add("--finetune-loss", choices=LOSSES, default=LOSSES[0], help="the dense model's own criterion, or the "
        "divergence from the dense model's probabilities (default: %(default)s)")  # fmt: skip
    add("--finetune-lr", type=float, default=5e-4, help="of Adam, falling to 0 (default: %(default)s)")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add_flags(parser)
    return parser


def check(args: Namespace) -> None:
    """Raises FlagError."""
    if args.sparse.exists():
        raise FlagError(f"{args.sparse} exists already")
    check_name("SPARSE", args.sparse, args.dense)
    check_upcycling(args, argument_parser().get_default)
    if args.calibration is None and args.upcycle is None:
        raise FlagError("--calibration must be given (only --upcycle can do without)")
    for name in ("calibration_tokens", "valid_tokens", "max_tokens", "moe_freq"):
        if getattr(args, name) < 1:
            raise FlagError(f"{flag(name)} must be at least 1, got {getattr(args, name)}")
    if args.router_hidden_dim < 0:
        raise FlagError(f"--router-hidden-dim must be 0 (linear) or more, got {args.router_hidden_dim}")
    if not 0 <= args.shared <= max(args.split - 2, 0):
        raise FlagError(f"--shared must be from 0 to --split {args.split} less 2, got {args.shared}")
    if not 0 < args.budget <= 1:
        raise FlagError(f"--budget must be in (0, 1], got {args.budget}")
    if args.max_loss is not None and not args.max_loss > 0:
        raise FlagError(f"--max-loss must be above 0, got {args.max_loss}")
    if args.finetune_updates < 0 or not args.finetune_lr > 0:
        raise FlagError("--finetune-updates must be 0 or more and --finetune-lr above 0, "
                        f"got {args.finetune_updates} and {args.finetune_lr}")  # fmt: skip


def main() -> None:
    convert(argument_parser().parse_args())


def convert(args: Namespace) -> None:
    """Raises UserError."""
    check(args)
    torch.manual_seed(args.seed)
    data = None if args.calibration is None else binarised_folders(args.calibration, "--calibration")
    dense = models.read_dense(args.dense, data)
    sides = models.converted_sides(dense, args.no_moe_encoder, args.no_moe_decoder)
    ffns = feed_forwards(dense.model, sides, args.moe_freq)
    if args.upcycle:
        upcycle(args, dense, ffns, sides)
    else:
        make_sparse(args, dense, ffns, sides)


def make_sparse(args: Namespace, dense: Dense, ffns: list[FeedForward], sides: tuple[str, ...]) -> None:
    settings = {"moe_num_experts": args.split - args.shared, "moe_router_hidden_dim": args.router_hidden_dim}
    whole = {"moe_threshold": 1.0, "moe_max_experts_per_token": 0}
    config = models.sparse_config(dense, ffns, args, sides, **settings, **whole)
    valid = Batches(dense.task, "valid", args.valid_tokens, args.max_tokens, args.seed)
    model = models.build_sparse(dense, config, calibrate(args, dense, ffns))
    models.compare(dense, model, next(iter(valid)))
    places = [(ffn.layer.fc1, ffn.layer.fc2) for ffn in ffns]
    before = measure_dense(dense.model, places, valid)
    choose = partial(choose_thresholds, args, model, valid, before)
    if args.finetune_updates:
        loss = distillation(dense) if args.finetune_loss == "distill" else task_loss(dense)
        finetune(model, dense.task, loss, args, choose)
    chosen, search = choose()
    rows = {"chosen": chosen, **rows_of_budgets(search)}
    config = Namespace(**{**vars(config), **settings_for(chosen.thresholds, args.moe_threshold_rule)})
    about = {
        "dense": args.dense.name, "experts": args.split, "shared": args.shared, "grouping": args.grouping,
        "calibration tokens": args.calibration_tokens, "fine-tuning updates": args.finetune_updates,
        "fine-tuned": args.finetune if args.finetune_updates else "nothing",
        "fine-tuning loss": args.finetune_loss, "router hidden units": args.router_hidden_dim,
        "thresholds": "per layer" if args.per_layer else "one for all layers",
        "threshold rule": args.moe_threshold_rule, "seed": args.seed,
        "threads": torch.get_num_threads(), models.TYPED: models.as_typed(config, dense.task),
    }  # fmt: skip
    report = report_of(search, about, rows, "dense", before, partial(ffn_seconds, dense.model, places))
    models.write_sparse(args, dense, config, model, report)


def choose_thresholds(
    args: Namespace, model: nn.Module, valid: Batches, dense: Quality
) -> tuple[Quality, Search]:
    """What is chosen is in use afterwards."""
    meter = Meter(model, valid, rule_named(args.moe_threshold_rule))
    search = Search(meter, equal_loss(meter) if args.per_layer else same_everywhere(meter), PRECISION)
    if args.max_loss is None:
        chosen = within_budget(search, args.budget)
    else:
        chosen = search.smallest(dense.bits_per_token + args.max_loss / math.log(2))
    fix_thresholds(model, chosen.thresholds, args.moe_threshold_rule)
    return chosen, search


def within_budget(search: Search, flops: float) -> Quality:
    """The most that costs no more than this share of the dense FFNs. Raises FlagError if none does."""
    if flops >= 1.0:  # with its router a whole layer costs a little over 1
        return search.at(1.0)
    if chosen := search.largest(lambda quality: quality.flops, flops):
        return chosen
    raise FlagError(
        f"--budget must be at least {search.at(0.0).flops:.3f}, what the fewest experts per token cost "
        f"(a larger --split costs less), got {flops}"
    )


def rows_of_budgets(search: Search) -> dict[str, Quality]:
    least = search.at(0.0).flops
    return {f"budget {budget:g}": within_budget(search, budget) for budget in BUDGETS if budget >= least}


if __name__ == "__main__":
    main()
