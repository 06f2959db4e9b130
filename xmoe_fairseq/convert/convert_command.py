"""xmoe-convert from end to end: read, calibrate, build, compare, fine-tune, choose t, write."""

import argparse
import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xmoe_fairseq.batches import Batches, binarised_folders
from xmoe_fairseq.convert.arguments import argument_parser, check
from xmoe_fairseq.convert.dense import ConvertError, Dense, read_dense
from xmoe_fairseq.convert.ffn import FeedForward, dense_places, feed, feed_forwards
from xmoe_fairseq.convert.finetune import finetune
from xmoe_fairseq.convert.grouping import CoActivation, group
from xmoe_fairseq.convert.router_fit import ROWS, Parts, RouterFit
from xmoe_fairseq.convert.sparse import (
    build_sparse,
    converted_sides,
    read_sparse,
    sparse_config,
    write_sparse,
)
from xmoe_fairseq.moe.records import fix_thresholds
from xmoe_fairseq.thresholds.checkpoint import settings_for
from xmoe_fairseq.thresholds.families import equal_loss, same_everywhere
from xmoe_fairseq.thresholds.measure import Meter, Quality, ffn_seconds, measure_dense
from xmoe_fairseq.thresholds.report import Report, table, write_report
from xmoe_fairseq.thresholds.search import Search
from xmoe_fairseq_compat.errors import FlagError, UserError

# Choices:
ROUTER_PASSES = 2  # over the calibration data
BUDGETS = (0.15, 0.25, 0.5, 1.0)  # in the table, as far as they can be met
PRECISION = 1 / 128  # of the search for t
EXACT = 1e-4  # largest difference of log-probabilities from the dense model's at t = 1


def main() -> None:
    parser = argument_parser()
    arguments = parser.parse_args()
    try:
        convert(arguments)
    except (UserError, ConvertError, OSError, RuntimeError) as error:
        parser.exit(1, f"xmoe-convert: {str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130, "xmoe-convert: interrupted; run it again to go on\n")


def convert(args: argparse.Namespace) -> None:
    check(args)
    torch.manual_seed(args.seed)
    dense = read_dense(args.dense, binarised_folders(args.calibration, "--calibration"))
    sides = converted_sides(dense, args.no_moe_encoder, args.no_moe_decoder)
    config = sparse_config(dense, args.split, sides)
    ffns = feed_forwards(dense.model, sides)
    valid = Batches(dense.task, "valid", args.valid_tokens, args.max_tokens, args.seed)
    model = build_sparse(dense, config, calibrate(args, dense, ffns))
    compare(dense, model, next(iter(valid)))
    with tqdm(desc="choose t", unit="measurement") as progress:
        places = dense_places(ffns)
        before = measure_dense(dense.model, places, valid)
        choose = partial(choose_thresholds, args, model, valid, before, progress.update)
        if args.finetune_updates:
            tune(args, dense, model, lambda: choose())
        chosen, search = choose()
        rows = {"chosen": chosen, **rows_of_budgets(search)}
        run_dense = partial(ffn_seconds, dense.model, places)
        times = search.meter.timed([*rows.values()], before, run_dense)
    fix_thresholds(model, chosen.thresholds)
    save(args, dense, model, config, chosen)
    about = {
        "dense": args.dense.name, "experts": args.split, "grouping": args.grouping,
        "calibration tokens": args.calibration_tokens, "fine-tuning updates": args.finetune_updates,
        "fine-tuned": args.finetune if args.finetune_updates else "nothing",
        "thresholds": "per layer" if args.per_layer else "one for all layers", "seed": args.seed,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    report = Report(about, "dense", before, dict(zip(rows, times, strict=True)), [*search.points.values()])
    written = write_report(args.sparse, report)
    print(table(report), end="")
    print("written: " + ", ".join(str(path) for path in [args.sparse, *written]))


def calibrate(
    args: argparse.Namespace, dense: Dense, ffns: list[FeedForward]
) -> dict[str, dict[str, Tensor]]:
    """The parameters of each MoE layer: neurons grouped, routers fitted."""
    train = Batches(dense.task, "train", args.calibration_tokens, args.max_tokens, args.seed)
    seen = {ffn.name: CoActivation(ffn, args.grouping == "coactivation") for ffn in ffns}
    with bar("neurons", args.calibration_tokens) as progress:
        feed(dense.model, ffns, train, lambda ffn, x: seen[ffn.name].add(ffn.hidden(x)), progress)
    for ffn in ffns:
        if not seen[ffn.name].is_finite():
            largest = max(float(weight.abs().max()) for weight in (ffn.fc1_weight, ffn.fc2_weight))
            raise ConvertError(
                f"{args.dense}: what {ffn.name} computes is beyond fp32, with weights of up to {largest:.2g};"
                " take an earlier checkpoint"
            )
    parts = {}
    for index, ffn in enumerate(tqdm(ffns, desc="group", unit="layer")):
        neurons_EF = group(args.grouping, ffn, seen[ffn.name], args.split, args.seed + index)
        parts[ffn.name] = Parts(ffn, neurons_EF, seen[ffn.name].mean_hidden())
    fits = {
        ffn.name: RouterFit(parts[ffn.name], ROUTER_PASSES * seen[ffn.name].tokens // ROWS, args.seed)
        for ffn in ffns
    }
    with bar("routers", ROUTER_PASSES * args.calibration_tokens) as progress:
        for _ in range(ROUTER_PASSES):
            feed(dense.model, ffns, train, lambda ffn, x: fits[ffn.name].add(x), progress)
            progress.set_postfix(excess=f"{sum(f.excess for f in fits.values()) / len(fits):.4f}")
    return {
        name: {**parts[name].state(), "router.weight": fit.weight_ED.detach()} for name, fit in fits.items()
    }


def bar(what: str, tokens: int) -> Any:
    return tqdm(desc=what, total=tokens, unit="token", unit_scale=True)


def compare(dense: Dense, sparse: nn.Module, sample: dict[str, Any]) -> None:
    """Raises ConvertError if the models differ with all experts: the dense one has something that we miss."""
    real = sample["target"].ne(dense.task.target_dictionary.pad())
    with torch.no_grad():
        ours, theirs = (
            model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)[real]  # type: ignore[operator]
            for model in (sparse, dense.model)
        )
    if not (difference := float((ours - theirs).abs().max())) < EXACT:
        raise ConvertError(f"with all experts the outputs differ from the dense model's by {difference:.2g}")


def choose_thresholds(
    args: argparse.Namespace, model: nn.Module, valid: Batches, dense: Quality, tick: Callable[[], Any]
) -> tuple[Quality, Search]:
    meter = Meter(model, valid, lambda _: tick())
    family = equal_loss(meter) if args.per_layer else same_everywhere(meter)
    search = Search(meter, family, PRECISION)
    if args.max_loss is None:
        chosen = within_budget(search, args.budget)
    else:
        chosen = search.smallest(dense.bits_per_token + args.max_loss / math.log(2))
    fix_thresholds(model, chosen.thresholds)
    return chosen, search


def within_budget(search: Search, flops: float) -> Quality:
    """The most that costs no more than this share of the dense FFNs. Raises FlagError if none does."""
    if flops >= 1.0:  # with its router a whole layer costs a little over 1
        return search.at(1.0)
    if chosen := search.largest(lambda quality: quality.flops, flops):
        return chosen
    raise FlagError(
        f"--budget must be at least {search.at(0.0).flops:.3f}, what one expert per token costs "
        f"(a larger --split costs less), got {flops}"
    )


def rows_of_budgets(search: Search) -> dict[str, Quality]:
    least = search.at(0.0).flops
    return {f"budget {budget:g}": within_budget(search, budget) for budget in BUDGETS if budget >= least}


def tune(args: argparse.Namespace, dense: Dense, model: nn.Module, choose: Callable[[], Any]) -> None:
    def batches(epoch: int) -> Batches:
        tokens = 2**62  # all
        return Batches(dense.task, "train", tokens, args.max_tokens, args.seed + 1 + epoch)

    criterion = dense.task.build_criterion(dense.cfg.criterion)
    with tqdm(desc="fine-tune", total=args.finetune_updates, unit="update") as progress:
        finetune(
            model,
            criterion,
            batches,
            args.finetune_updates,
            args.finetune,
            args.finetune_lr,
            choose,
            progress,
        )


def save(
    args: argparse.Namespace, dense: Dense, model: nn.Module, config: Namespace, chosen: Quality
) -> None:
    vars(config).update(settings_for(chosen.thresholds))
    write_sparse(dense, model, config, args.sparse)
    try:
        read_sparse(args.sparse, dense.task)
    except Exception:
        args.sparse.unlink()
        raise


if __name__ == "__main__":
    main()
