"""Times whole updates of models with and without experts, part by part. See benchmark_training.sh."""

import argparse
import copy
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fairseq.trainer import Trainer
from rich.progress import track
from torch import nn

from benchmarks.parts import time_by_part
from benchmarks.subjects import EVERY_SLOT, kernels, left_out, with_every_slot
from benchmarks.tables import ratios, write_table
from benchmarks.timing import add_common, in_turn
from benchmarks.updates import (
    SIZES,
    Setup,
    experts_per_token,
    updates,
    with_narrow_ffns,
    with_transformers_blocks,
)
from xmoe_fairseq.moe import moe_layers, use_kernel
from xmoe_fairseq.tables import markdown

DENSE = "dense"
Row = dict[str, Any]
Subject = tuple[Trainer, Callable[[], None]]


def in_slots(model: nn.Module, way: Any, capacity_factor: float) -> nn.Module:
    """A copy, the same weights and routers, that computes `capacity_factor * T` rows in every MoE layer."""
    other = copy.deepcopy(model)
    for layer in moe_layers(other):
        layer.experts = with_every_slot(layer, way, capacity_factor).experts  # type: ignore[arg-type]
    return other


def check_equal(setup: Setup, model: nn.Module) -> None:
    """Loss and gradients (but the experts' own) of every way, with room for all tokens in every expert.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    ways = {kernel: (kernel, model) for kernel in kernels()}
    room = setup.model_cfg.moe_num_experts
    ways |= {name: ("auto", in_slots(model, way, room)) for name, way in EVERY_SLOT.items()}
    found = {}
    for name, (kernel, other) in ways.items():
        torch.manual_seed(1)  # dropout
        other.zero_grad()
        with use_kernel(kernel):
            loss, sample_size, _ = setup.criterion()(other, setup.batches[0])
            (loss / sample_size).backward()
        found[name] = [loss.detach() / sample_size] + [
            p.grad for n, p in other.named_parameters() if ".experts." not in n
        ]
    for name, values in found.items():
        torch.testing.assert_close(values, found["plain"], rtol=1e-4, atol=1e-6, msg=f"{name} differs")


def subjects(setup: Setup, warm_up: int) -> dict[str, Subject]:
    """Trainers, the first the one with which the others are compared, and their updates.

    The model with experts is trained for a while before it is timed and copied: its budgets then hold.
    """
    ours = setup.model()
    check_equal(setup, ours)
    trainer, fastest = setup.trainer(ours), kernels()[0]
    found: dict[str, Subject] = {}
    for kernel in kernels():
        found[kernel] = trainer, use_kernel(kernel)(updates(trainer, setup.batches))
    for _ in track(range(warm_up), "warm-up", transient=True):
        found[fastest][1]()
    split = setup.model_cfg.moe_ffn_split
    models = {
        DENSE: setup.model("--moe-freq 0"),
        "dense, equal active width": with_narrow_ffns(setup, ours),
        "Hugging Face, grouped": with_transformers_blocks(setup, ours),
        "fairscale, top-2": setup.model("--moe-router gshard --moe-target-experts-per-token 0"),
        **{name: in_slots(ours, way, split) for name, way in EVERY_SLOT.items()},
    }
    for name, model in models.items():
        if model is not None:
            other = setup.trainer(model)
            found[name] = other, updates(other, setup.batches)
    return {DENSE: found.pop(DENSE), **found}


def measure(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """A row for each number of threads, and the parts of updates."""
    torch.manual_seed(1)
    setup = Setup(SIZES[name], shlex.split(args.flags))
    found = subjects(setup, args.warm_up)
    fastest, rounds = kernels()[0], args.rounds * setup.size.repeats
    words = sum(batch["ntokens"] for batch in setup.batches) / len(setup.batches)
    for threads in args.threads:
        torch.set_num_threads(threads)
        timings = in_turn({name: update for name, (_, update) in found.items()}, rounds)
        taken = experts_per_token(setup, found[fastest][0].model)
        yield {
            "size": name, "threads": threads, "tokens": round(words), "experts per token": f"{taken:.2f}",
            "timings": timings,
            "parts": {name: time_by_part(*found[name], rounds) for name in (fastest, DENSE)},
        }  # fmt: skip


def parts_table(row: Row) -> str:
    """Milliseconds and share of an update."""
    titles = [f"{row['size']}, {row['threads']} thread(s): ms of an update"]
    rows: dict[str, list[str]] = {part: [part] for times in row["parts"].values() for part in times}
    last = ["all of it (without the clock)"]
    for name, times in row["parts"].items():
        titles += [f"{name}: forward", "backward", "share"]
        whole = sum(map(sum, times.values()))
        for part, cells in rows.items():
            both = times.get(part, (0.0, 0.0))
            cells += [*(f"{t:.2f}" if t else "" for t in both), f"{100 * sum(both) / whole:.1f} %"]
        last += [f"{whole:.2f} ({row['timings'][name].milliseconds:.2f})", "", ""]
    return markdown(titles, [*rows.values(), last])


def report(rows: list[Row]) -> Iterator[str]:
    yield from left_out()
    yield ratios(rows, ("size", "threads", "tokens", "experts per token"))
    yield from map(parts_table, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser, "training", rounds=5)
    default = ["demo-mt", "demo-lm", "claims-lm"]
    parser.add_argument("--size", choices=SIZES, nargs="+", default=default, help=f"of {', '.join(SIZES)}")
    parser.add_argument("--warm-up", type=int, default=30, help="updates first, in which budgets settle")
    parser.add_argument("--flags", default="", help="further flags of fairseq-train, as one word")
    args = parser.parse_args(arguments)
    rows = [row for size in args.size for row in measure(size, args)]
    write_table({"rows": rows}, report(rows), args.out)


if __name__ == "__main__":
    main()
