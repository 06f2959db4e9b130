"""Times an MoE layer against its floor, the paper's way to execute it, and peers. See benchmark_layer.sh."""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.subjects import (
    DenseFFN,
    Floor,
    PaperStyleExperts,
    SlotExperts,
    fairscale_layer,
    moe_layer,
    output_of,
    training,
    transformers_block,
)
from benchmarks.tables import layer_table, plot, write_table
from benchmarks.timing import add_common, forward, in_turn, machine
from xmoe_fairseq.moe import MoELayer, TopKRouter

TOKENS, MODEL_DIM, NUM_EXPERTS, EXPERT_DIM = 2048, 512, 64, 256  # reference point A
PER_TOKEN = (2, 4, 6, 8, 16)
GRANULARITY = (8, 32, 64, 128, 256)  # experts, E / 8 of them per token: the FLOPs of a dense FFN of 2,048
PAPER_CAPACITY = 8.0
EVERY_SLOT = {"paper's way, capacity 8": PaperStyleExperts, "its slots, no needless copies": SlotExperts}
Row = dict[str, Any]


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(count, MODEL_DIM, requires_grad=True)


def floor_of(layer: MoELayer, x: Tensor) -> tuple[Floor, Tensor]:
    """The floor under a layer on these tokens, and its input."""
    with torch.no_grad():
        num_rows = layer(x)[1].token_R.numel()
    return Floor(MODEL_DIM, layer.experts.fc1_weight.size(1)), tokens(num_rows)


def against_floor(num_experts: int, expert_dim: int, per_token: float, rounds: int) -> Row:
    x = tokens()
    layer = moe_layer(x, num_experts, expert_dim, per_token)
    subjects: dict[str, tuple[nn.Module, Tensor]] = {"floor": floor_of(layer, x), "layer": (layer, x)}
    one_way = {name: forward(output_of(*subject)) for name, subject in subjects.items()}
    both_ways = {name: training(*subject) for name, subject in subjects.items()}
    return {
        "experts": num_experts, "width": expert_dim, "per token": subjects["floor"][1].size(0) / TOKENS,
        "forward": in_turn(one_way, rounds), "forward + backward": in_turn(both_ways, rounds),
    }  # fmt: skip


def against_others(per_token: int, rounds: int) -> Row:
    """The layer, then what else computes as many FLOPs (the paper's way: more)."""
    x = tokens()
    layer = moe_layer(x, NUM_EXPERTS, EXPERT_DIM, per_token)
    slots = {name: every_slot(layer, way) for name, way in EVERY_SLOT.items()}
    with torch.no_grad():
        for other in slots.values():
            torch.testing.assert_close(other(x)[0], layer(x)[0], rtol=1e-4, atol=1e-4)
    dense = DenseFFN(MODEL_DIM, per_token * EXPERT_DIM)
    blocks = {"XMoE layer": layer, **slots, "dense FFN of equal active width": dense}
    functions = {name: training(block, x) for name, block in blocks.items()}
    x3 = x.detach().view(NUM_EXPERTS, -1, MODEL_DIM).requires_grad_()  # fairscale's rule
    functions |= {name: training(block, x3) for name, block in peers(per_token).items()}
    return {"per token": per_token, "forward + backward": in_turn(functions, rounds)}


def every_slot(layer: MoELayer, way: type[PaperStyleExperts]) -> MoELayer:
    """The same router and experts, with capacity slots for the tokens that fit; equal outputs if all do."""
    other = MoELayer(MODEL_DIM, EXPERT_DIM, NUM_EXPERTS, layer.router)
    other.experts = way(layer.experts, PAPER_CAPACITY)
    return other


def peers(per_token: int) -> dict[str, nn.Module]:
    sizes = (MODEL_DIM, NUM_EXPERTS, EXPERT_DIM)
    found = {
        "transformers Mixtral, eager": transformers_block(*sizes, per_token, "eager"),
        "transformers Mixtral, grouped": transformers_block(*sizes, per_token, "grouped_mm"),
    }
    if per_token == 2:
        found["fairscale GShard top-2"] = fairscale_layer(*sizes)
    return {name: block for name, block in found.items() if block is not None}


def decoding(count: int, rounds: int) -> Row:
    """Few tokens: the dense FFN of the same total width, then all and a quarter of the experts."""
    x = torch.randn(count, MODEL_DIM)
    dense = DenseFFN(MODEL_DIM, NUM_EXPERTS * EXPERT_DIM).eval()
    functions = {"dense": forward(lambda: dense(x))}
    for k in (NUM_EXPERTS, NUM_EXPERTS // 4):
        router = TopKRouter(MODEL_DIM, NUM_EXPERTS, k)
        layer = MoELayer(MODEL_DIM, EXPERT_DIM, NUM_EXPERTS, router).eval()
        functions[f"{k} of {NUM_EXPERTS} experts"] = forward(output_of(layer, x))
    return {"tokens": count, "forward": in_turn(functions, rounds)}


def peak_memory(what: str) -> float:
    """MB that one forward + backward adds to this process at its peak, gradients of parameters included."""
    torch.manual_seed(1)
    x = tokens()
    layer = moe_layer(x, NUM_EXPERTS, EXPERT_DIM, 6)
    _, rows = floor_of(layer, x)
    run = training(layer, x) if what == "layer" else training(DenseFFN(MODEL_DIM, EXPERT_DIM), rows)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew
    before = memory_mark("VmRSS")
    run()
    return memory_mark("VmHWM") - before


def anew(what: str) -> float:
    """`peak_memory` in a process of its own, which gives memory back as a process does by default."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (what,))


def memory_mark(name: str) -> float:
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(name))
    return int(line.split()[1]) / 1000


def jobs(rounds: int) -> dict[str, list[Callable[[], Row]]]:
    whole = NUM_EXPERTS * EXPERT_DIM
    return {
        "cost follows computation":
            [partial(against_floor, NUM_EXPERTS, EXPERT_DIM, k, rounds) for k in PER_TOKEN],
        "fine granularity": [partial(against_floor, e, whole // e, e / 8, rounds) for e in GRANULARITY],
        "against others": [partial(against_others, k, rounds) for k in (2, 6)],
        "decoding": [partial(decoding, count, 3 * rounds) for count in (1, 8, 64)],
    }  # fmt: skip


def measure(rounds: int, sections: list[str]) -> dict[str, list[Row]]:
    results: dict[str, list[Row]] = {}
    chosen = [(name, job) for name in sections for job in jobs(rounds)[name]]
    for name, job in track(chosen, description=f"{torch.get_num_threads()} thread(s)"):
        torch.manual_seed(1)
        results.setdefault(name, []).append(job())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser, "layer", rounds=5)
    sections = [*jobs(0)]
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, metavar="SECTION")
    args = parser.parse_args()
    torch.manual_seed(1)
    results: dict[str, Any] = {"machine": machine(), "threads": {}}
    for threads in args.threads:
        torch.set_num_threads(threads)
        results["threads"][threads] = measure(args.rounds, args.only)
    results["peak memory, MB"] = {what: anew(what) for what in ("layer", "dense")}
    write_table(results, layer_table(results), args.out)
    if "cost follows computation" in args.only:
        plot(results, args.out / "benchmark.png")
        print(f"{args.out}/benchmark.png")


if __name__ == "__main__":
    main()
