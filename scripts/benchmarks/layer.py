"""Times an MoE layer against its floor, the paper's way to execute it, and peers. See benchmark_layer.sh."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from benchmarks.tables import write_report
from benchmarks.timing import add_rounds, forward, in_turn, machine
from xmoe_fairseq.moe import MoELayer, TopKRouter

RUN = Path(__file__).parents[1] / "run.py"
TOKENS, MODEL_DIM, NUM_EXPERTS, EXPERT_DIM = 2048, 512, 64, 256  # reference point A
PER_TOKEN = (2, 4, 6, 8, 16)
GRANULARITY = (8, 32, 64, 128, 256)  # experts, E / 8 of them per token: the FLOPs of a dense FFN of 2,048
PAPER_CAPACITY = 8.0
EVERY_SLOT = {"paper's way, capacity 8": PaperStyleExperts, "its slots, no needless copies": SlotExperts}
SECTIONS = ("cost follows computation", "fine granularity", "against others", "decoding")
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
    floor, rows = floor_of(layer, x)
    subjects: dict[str, tuple[nn.Module, Tensor]] = {"floor": (floor, rows), "layer": (layer, x)}
    one_way = {name: forward(output_of(*subject)) for name, subject in subjects.items()}
    both_ways = {name: training(*subject) for name, subject in subjects.items()}
    return {
        "experts": num_experts, "width": expert_dim, "per token": rows.size(0) / x.size(0),
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
    """MB that one forward + backward adds to a process at its peak; gradients of the parameters included."""
    output = subprocess.run(
        [sys.executable, RUN, "benchmarks.layer", "--memory-of", what],
        check=True,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
    )
    return float(output.stdout)


def print_peak_memory(what: str) -> None:
    x = tokens()
    layer = moe_layer(x, NUM_EXPERTS, EXPERT_DIM, 6)
    _, rows = floor_of(layer, x)
    run = training(layer, x) if what == "layer" else training(DenseFFN(MODEL_DIM, EXPERT_DIM), rows)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew
    before = memory_mark("VmRSS")
    run()
    print(memory_mark("VmHWM") - before)


def memory_mark(name: str) -> float:
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(name))
    return int(line.split()[1]) / 1000


def measure(rounds: int, quick: bool, sections: list[str]) -> dict[str, list[Row]]:
    def jobs() -> Iterator[tuple[str, Callable[[], Row]]]:
        for per_token in PER_TOKEN[1:3] if quick else PER_TOKEN:
            yield (
                "cost follows computation",
                partial(against_floor, NUM_EXPERTS, EXPERT_DIM, per_token, rounds),
            )
        for experts in GRANULARITY[:2] if quick else GRANULARITY:
            width = NUM_EXPERTS * EXPERT_DIM // experts
            yield "fine granularity", partial(against_floor, experts, width, experts / 8, rounds)
        for per_token in (2, 6):
            yield "against others", partial(against_others, per_token, rounds)
        for count in (1, 8, 64):
            yield "decoding", partial(decoding, count, 3 * rounds)

    results: dict[str, list[Row]] = {}
    chosen = [(name, job) for name, job in jobs() if name in (sections or SECTIONS)]
    for name, job in track(chosen, description=f"{torch.get_num_threads()} thread(s)"):
        torch.manual_seed(1)
        results.setdefault(name, []).append(job())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    add_rounds(parser, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=[], metavar="SECTION", help=f"of {SECTIONS}"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_layer"), help="folder")
    parser.add_argument("--memory-of", choices=["layer", "dense"], help="print this one's peak only")
    args = parser.parse_args()
    torch.manual_seed(1)
    if args.memory_of:
        return print_peak_memory(args.memory_of)
    results: dict[str, Any] = {"machine": machine(), "threads": {}}
    for threads in args.threads:
        torch.set_num_threads(threads)
        results["threads"][threads] = measure(args.rounds, args.quick, args.only)
    results["peak memory, MB"] = {what: peak_memory(what) for what in ("layer", "dense")}
    write_report(results, args.out)


if __name__ == "__main__":
    main()
