"""Times whole updates of a translation model, and takes an MoE layer apart. See benchmark_training.sh."""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.progress import track
from torch import nn

from benchmarks.profile_layer import first_call, share_outside_products, time_by_kind
from benchmarks.subjects import PaperStyleExperts, SlotExperts, set_experts_per_token
from benchmarks.tables import write_table
from benchmarks.timing import add_common, in_turn, machine
from benchmarks.translation import SIDES, Sample, Setup, batch, build_setup, dropped_share
from xmoe_fairseq.moe import MoELayer, moe_layers
from xmoe_fairseq.tables import markdown

DENSE = "dense FFN"
OURS = "chosen rows only"
EVERY_SLOT = {"paper's way": PaperStyleExperts, "its slots, no needless copies": SlotExperts}
Row = dict[str, Any]


def update(setup: Setup, model: nn.Module, sample: Sample, optimizer: Any) -> Callable[[], None]:
    """What fairseq's trainer does in a step: loss, gradients, their mean, their norm, Adam."""

    def run() -> None:
        optimizer.zero_grad()
        loss, sample_size, _ = setup.criterion(model, sample)
        optimizer.backward(loss)
        optimizer.multiply_grads(1 / sample_size)
        optimizer.clip_grad_norm(setup.cfg.optimization.clip_norm)
        optimizer.step()

    return run


def with_every_slot(model: nn.Module, way: type[PaperStyleExperts], capacity_factor: float) -> nn.Module:
    """A copy, the same weights and routers, that computes `capacity_factor * T` rows in every MoE layer."""
    other = copy.deepcopy(model)
    for layer in moe_layers(other):
        layer.experts = way(layer.experts, capacity_factor)  # type: ignore[arg-type]
    return other


def calibrate(setup: Setup, model: nn.Module, sample: Sample, per_token: float) -> None:
    """Thresholds such that this batch takes `per_token` experts on average in each MoE layer."""

    def set_threshold(layer: MoELayer, inputs: tuple[Any, ...]) -> None:
        x, mask = inputs[:2]
        set_experts_per_token(layer.router, x[~mask] if mask is not None else x.flatten(0, -2), per_token)  # type: ignore[arg-type]

    hooks = [layer.register_forward_pre_hook(set_threshold) for layer in moe_layers(model)]
    with torch.no_grad():
        setup.criterion(model, sample)
    for hook in hooks:
        hook.remove()


def check_equal(setup: Setup, ours: nn.Module, sample: Sample) -> None:
    """Loss and gradients of every way, with room for all tokens in every expert.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    found = {}
    for name, way in ({OURS: None} | EVERY_SLOT).items():
        model = copy.deepcopy(ours) if way is None else with_every_slot(ours, way, setup.args.experts)
        torch.manual_seed(1)  # dropout
        loss, _, _ = setup.criterion(model, sample)
        loss.backward()
        grads = {key: p.grad for key, p in model.named_parameters() if ".experts." not in key}
        for layer in moe_layers(model):
            stacks: Any = layer.experts.stacked() if way is None else map(tuple, layer.experts.stacks)  # type: ignore[arg-type]
            for kind, stack in enumerate(stacks):
                grads[f"{layer.name} {kind}"] = (
                    stack.grad if way is None else torch.stack([weight.grad for weight in stack])
                )
        found[name] = (loss.detach(), grads)
    for other in list(found)[1:]:
        torch.testing.assert_close(found[other], found[OURS], rtol=1e-4, atol=1e-5, msg=f"{other} differs")


def training(setup: Setup, per_token: float, sample: Sample) -> Row:
    """Updates of each model in turn on one batch."""
    ours = setup.model(sparse=True)
    calibrate(setup, ours, sample, per_token)
    check_equal(setup, ours, batch(setup, 8))
    models = {OURS: ours}
    for name, way in EVERY_SLOT.items():
        models[name] = with_every_slot(ours, way, setup.args.capacity)
    models[DENSE] = setup.model(sparse=False)
    updates = {name: update(setup, model, sample, setup.optimizer(model)) for name, model in models.items()}
    timings = in_turn(updates, setup.args.rounds, warm_up=1)
    return {
        "MoE in": setup.moe_in,
        "experts per token": per_token,
        "dropped by capacity": dropped_share(ours, setup, sample),
        "update": timings,
        "tokens per second": {name: 1000 * sample["ntokens"] / t.milliseconds for name, t in timings.items()},
        **profiled(setup, ours, sample),
    }


def profiled(setup: Setup, model: nn.Module, sample: Sample) -> Row:
    """The first MoE layer, on what the model hands to it."""
    call, rounds = first_call(model, lambda: setup.criterion(model, sample)), 2 * setup.args.rounds
    whole = in_turn({"layer": call.run}, rounds)["layer"].milliseconds
    return {"MoE layer": time_by_kind(call, rounds), "MoE layer without the profiler, ms": whole}


def measure(setups: list[Setup]) -> Iterator[tuple[int, list[Row]]]:
    args = setups[0].args
    sample = batch(setups[0], args.sentences)
    for threads in args.threads:
        torch.set_num_threads(threads)
        jobs = [(setup, per_token, sample) for setup in setups for per_token in args.per_token]
        yield threads, [training(*job) for job in track(jobs, description=f"{threads} thread(s)")]


def report(results: dict[str, Any]) -> list[str]:
    """Ratios are of times, to ours, round by round: median (quartiles); at 1.3 ours is 1.3 times faster."""
    titles = ("threads", "MoE in", "experts per token", "model", "tokens/s", "time of an update", "dropped")
    rows = []
    for threads, row in by_threads(results):
        for name, timing in row["update"].items():
            speed, dropped = row["tokens per second"][name], f"{100 * row['dropped by capacity']:.1f} %"
            cells = (threads, row["MoE in"], f"{row['experts per token']:g}", name, f"{speed:.0f}", timing)
            rows.append([*map(str, cells), dropped if name in EVERY_SLOT else ""])
    heading = results["shape"]
    return [heading, markdown(titles, rows), profile_table(by_threads(results))]


def by_threads(results: dict[str, Any]) -> list[tuple[int, Row]]:
    return [(threads, row) for threads, rows in results["threads"].items() for row in rows]


def profile_table(columns: list[tuple[int, Row]]) -> str:
    heads = [f"{n} thread(s), {row['MoE in']}, k = {row['experts per token']:g}" for n, row in columns]
    times = [row["MoE layer"] for _, row in columns]
    cells = [
        {kind: f"{t[kind]:.1f} ms, {100 * t[kind] / sum(t.values()):.0f} %" for kind in t} for t in times
    ]
    rows = [[kind, *(column[kind] for column in cells)] for kind in times[0]]
    rows.append(["**outside matrix products**", *(f"{100 * share_outside_products(t):.0f} %" for t in times)])
    whole = (f"{row['MoE layer without the profiler, ms']:.1f} ms" for _, row in columns)
    rows.append(["all of it, without the profiler", *whole])
    return markdown(["an MoE layer, forward + backward", *heads], rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser, "training", rounds=5)
    parser.add_argument("--per-token", type=float, nargs="+", default=[2], help="experts, on average")
    parser.add_argument("--sentences", type=int, default=64, help="in a batch (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 2], help="encoder's and decoder's")
    parser.add_argument("--moe-in", choices=SIDES, nargs="+", default=["both"], help="encoder = as the paper")
    parser.add_argument("--experts", type=int, default=64, help="in an MoE layer")
    parser.add_argument("--split", type=int, default=8, help="s: an expert's width is 2,048 / s")
    parser.add_argument("--capacity", type=float, help="factor of the paper's way (default: s, as there)")
    parser.add_argument("--flags", default="", help="further flags of fairseq-train, as one word")
    args = parser.parse_args(arguments)
    if args.split < 1:
        parser.error(f"--split must be at least 1, got {args.split}")
    for per_token in args.per_token:
        if not 1 <= per_token <= args.experts:
            parser.error(f"--per-token must be in [1, --experts = {args.experts}], got {per_token:g}")
    args.capacity = args.capacity or args.split
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.manual_seed(1)
    setups = [build_setup(args, moe_in) for moe_in in args.moe_in]
    results = {"machine": machine(), "shape": setups[0].shape, "threads": dict(measure(setups))}
    write_table(results, report(results), args.out)


if __name__ == "__main__":
    main()
