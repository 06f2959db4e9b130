"""Upcycling: a dense model as the start of a larger one. N copies of each FFN, each cut into G experts.

Komatsuzaki et al. 2022, arXiv 2212.05055, for G = 1; He et al. 2024, arXiv 2410.07524, whose virtual groups
are the N copies of a part. A token takes one copy, whichever: the model begins as the dense one, exactly, and
the copies part as they are trained by different tokens. That is fairseq-train's affair.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xmoe_fairseq.activated import describe_model
from xmoe_fairseq.batches import Batches
from xmoe_fairseq.convert import models
from xmoe_fairseq.convert.ffn import FeedForward
from xmoe_fairseq.convert.models import Dense
from xmoe_fairseq.moe import TopKRouter
from xmoe_fairseq.thresholds.measure import Meter, ffn_seconds, measure_dense
from xmoe_fairseq.thresholds.report import Report
from xmoe_fairseq_compat.errors import FlagError, flag

ROUTERS, COMBINES = ("topk", "threshold"), ("ones", "normalized")
ONLY = ("moe_router", "moe_threshold", "moe_topk", "moe_combine")  # flags that are for upcycling alone
NEVER = ("shared", "calibration_tokens", "grouping", "budget", "max_loss", "per_layer", "finetune_updates",
         "finetune", "finetune_loss", "finetune_lr", "router_hidden_dim")  # fmt: skip


def add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("upcycling").add_argument
    add("--upcycle", type=int, metavar="N", help="N copies of each FFN, each cut so; nothing is left out")
    add("--moe-router", choices=ROUTERS, default=ROUTERS[0],
        help="a token takes --moe-topk experts, or --split at most (default: %(default)s)")  # fmt: skip
    add("--moe-threshold", type=float, metavar="T", help="of --moe-router threshold")
    add("--moe-topk", type=int, default=0, metavar="K",
        help="of --moe-router topk: a multiple of --split, so many whole copies (default: one)")  # fmt: skip
    add("--moe-combine", choices=COMBINES, default=COMBINES[0],
        help="weights of the experts (default: %(default)s)")  # fmt: skip


def check_upcycling(args: Namespace, default: Callable[[str], Any]) -> None:
    """Raises FlagError: a flag that would be passed over; a threshold that would begin as another model.

    Args:
        default: of a flag of xmoe-convert.
    """
    upcycles, given = args.upcycle is not None, args.moe_threshold
    for name in NEVER if upcycles else ONLY:
        if getattr(args, name) != default(name):
            rule = "cannot be combined with" if upcycles else "needs"
            raise FlagError(f"{flag(name)} {rule} --upcycle, got {getattr(args, name)}")
    if not upcycles:
        return
    check_copies(args)
    if args.moe_router == "threshold":
        rule, begins_whole = taking_a_copy(args)
        if given is None or not begins_whole(given):
            begin = f"{rule} by the rule {args.moe_threshold_rule}, to begin as the dense model"
            raise FlagError(f"--moe-threshold must be {begin}, got {given}")
    for name in ("moe_threshold", "moe_threshold_rule") if args.moe_router != "threshold" else ():
        if getattr(args, name) != default(name):
            raise FlagError(f"{flag(name)} needs --moe-router threshold, got --moe-router {args.moe_router}")


def check_copies(args: Namespace) -> None:
    """Raises FlagError."""
    if not (args.upcycle > 0 and args.split > 0):
        raise FlagError(f"--upcycle and --split must be at least 1, got {args.upcycle} and {args.split}")
    if args.moe_topk and (args.moe_router != "topk" or args.moe_topk < 0 or args.moe_topk % args.split):
        rule = f"needs --moe-router topk, and must be a multiple of --split {args.split}"
        raise FlagError(f"--moe-topk {rule}, got {args.moe_topk}")
    if args.moe_combine == "normalized" and (args.moe_topk or args.split) == 1:
        raise FlagError("--moe-combine normalized needs more than one expert per token: add --moe-topk")


def taking_a_copy(args: Namespace) -> tuple[str, Callable[[float], bool]]:
    """Thresholds by which every token wants the G parts of its most probable copy at least, whatever the
    router: they have equal shares, to rounding, of 1 at most, and each 1 / E at least. The limit of G experts
    takes away what it wants beyond them."""
    before_last, least = 1 - 1 / args.split, 1 / (args.split * args.upcycle)
    return {
        "mass": (f"in [{before_last:g}, 1]", lambda t: before_last <= t <= 1),
        "probability": (f"in [0, {least:g})", lambda t: 0 <= t < least),
        "relative": ("in [0.001, 1]", lambda t: 0.001 <= t <= 1),
    }[args.moe_threshold_rule]


def upcycle(args: Namespace, dense: Dense, ffns: list[FeedForward], sides: tuple[str, ...]) -> None:
    """Write the checkpoint and its report. Raises UserError."""
    settings = {
        "moe_router": args.moe_router, "moe_num_experts": args.upcycle * args.split,
        # Of first choices all would be the first part of some copy.
        "moe_balance": "all",
        "moe_combine": args.moe_combine, "moe_topk": args.moe_topk,
        # Of several copies the mean; normalized weights add up to 1, and the parts of a copy to G.
        "moe_output_scale": args.split / (args.moe_topk or args.split if args.moe_combine == "ones" else 1),
    }  # fmt: skip
    if args.moe_router == "threshold":
        threshold = {"moe_threshold": args.moe_threshold, "moe_threshold_rule": args.moe_threshold_rule}
        most = {"moe_max_experts_per_token": args.split, "moe_target_experts_per_token": 0.0}
        settings |= {**threshold, **most}
    config = models.sparse_config(dense, ffns, args, sides, **settings)
    layers = {ffn.name: copies(ffn, args.upcycle, args.split, args.moe_combine) for ffn in ffns}
    model = models.build_sparse(dense, config, layers)
    valid = Batches(dense.task, "valid", args.valid_tokens, args.max_tokens, args.seed)
    difference = models.compare(dense, model, next(iter(valid)))
    about = {
        "dense": args.dense.name, "copies of each FFN": args.upcycle, "experts of a copy": args.split,
        "largest difference of log-probabilities": f"{difference:.2g}", "seed": args.seed,
        "activated parameters per token": describe_model(model, config).partition(": ")[2],
        models.TYPED: models.as_typed(config, dense.task),
    }  # fmt: skip
    places = [(ffn.layer.fc1, ffn.layer.fc2) for ffn in ffns]
    meter, before = Meter(model, valid), measure_dense(dense.model, places, valid)
    found = meter.measure([])
    (timed,) = meter.timed([found], before, partial(ffn_seconds, dense.model, places))
    report = Report(about, "dense", before, {"upcycled": timed}, [found])
    models.write_sparse(args, dense, config, model, report)


def copies(ffn: FeedForward, number: int, parts: int, combine: str) -> dict[str, Tensor]:
    """Parameters of an MoELayer: expert n * G + g is the g-th part of the n-th copy.

    The parts of a copy have one row of the router's weight, and so one probability: the G most probable
    experts are a whole copy, and add up to the dense FFN.
    """
    model_dim = ffn.fc1_weight.size(1)
    # Weights of 1 have a bias of their own; others carry a share of it in each expert.
    shared_bias = {"output_bias": ffn.fc2_bias} if combine == "ones" else {}
    fc2_bias = torch.zeros_like(ffn.fc2_bias) if combine == "ones" else ffn.fc2_bias / parts
    fc2_weight = ffn.fc2_weight.unflatten(1, (parts, -1)).transpose(0, 1)  # (G, D, F/G)
    return {
        "experts.fc1_weight": ffn.fc1_weight.unflatten(0, (parts, -1)).repeat(number, 1, 1),
        "experts.fc1_bias": ffn.fc1_bias.unflatten(0, (parts, -1)).repeat(number, 1),
        "experts.fc2_weight": fc2_weight.repeat(number, 1, 1),
        "experts.fc2_bias": fc2_bias.repeat(number * parts, 1),
        **shared_bias,
        "router.weight": TopKRouter(model_dim, number).weight.detach().repeat_interleave(parts, 0),
    }
