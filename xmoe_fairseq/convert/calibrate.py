"""What the calibration data say of a dense model's FFNs: neurons grouped into experts, and routers fitted."""

from argparse import Namespace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.convert.ffn import FeedForward, feed
from xmoe_fairseq.convert.grouping import CoActivation, group
from xmoe_fairseq.convert.models import Dense
from xmoe_fairseq.convert.router_fit import ROWS, Parts, RouterFit
from xmoe_fairseq_compat.errors import UserError

ROUTER_PASSES = 2  # over the calibration data: a choice


def calibrate(args: Namespace, dense: Dense, ffns: list[FeedForward]) -> dict[str, dict[str, Tensor]]:
    """The parameters of each MoE layer. Raises UserError: what an FFN computes is not finite.

    Args:
        args: of xmoe-convert.
    """
    train = Batches(dense.task, "train", args.calibration_tokens, args.max_tokens, args.seed)
    pairs, shared = args.grouping == "coactivation", args.shared / args.split
    seen = {ffn.name: CoActivation(ffn, pairs, shared) for ffn in ffns}
    with bar("neurons", args.calibration_tokens) as progress:
        feed(dense.model, ffns, train, lambda ffn, x: seen[ffn.name].add(ffn.hidden(x)), progress)
    fits = {}
    for index, ffn in enumerate(tqdm(ffns, desc="group", unit="layer")):
        here = seen[ffn.name]
        if not here.is_finite():
            largest = max(float(weight.abs().max()) for weight in (ffn.fc1_weight, ffn.fc2_weight))
            raise UserError(
                f"{args.dense}: what {ffn.name} computes is beyond fp32, with weights of up to {largest:.2g};"
                " take an earlier checkpoint"
            )
        shared_N, routed_N = here.shared_and_others()
        neurons_EF = group(args.grouping, ffn, here, args.split - args.shared, args.seed + index, routed_N)
        parts = Parts(ffn, neurons_EF, here.mean_hidden(), shared_N)
        steps = ROUTER_PASSES * here.tokens // ROWS
        fits[ffn.name] = RouterFit(parts, steps, args.seed, args.router_hidden_dim)
    with bar("routers", ROUTER_PASSES * args.calibration_tokens) as progress:
        for _ in range(ROUTER_PASSES):
            feed(dense.model, ffns, train, lambda ffn, x: fits[ffn.name].add(x), progress)
            progress.set_postfix(excess=f"{sum(f.excess for f in fits.values()) / len(fits):.4f}")
    return {name: fit.state() for name, fit in fits.items()}


def bar(what: str, tokens: int) -> Any:
    return tqdm(desc=what, total=tokens, unit="token", unit_scale=True)
