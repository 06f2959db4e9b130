"""Times an MoE layer by each kernel, its floor, the paper's way and peers. See benchmark_layer.sh."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.memory import peak_memory_anew
from benchmarks.subjects import (
    EVERY_SLOT,
    DenseFFN,
    Floor,
    evaluation,
    fairscale_layer,
    kernels,
    left_out,
    moe_layer,
    training,
    transformers_block,
    with_every_slot,
)
from benchmarks.tables import ratios, write_table
from benchmarks.timing import add_common, in_turn
from xmoe_fairseq.moe import MoELayer, ThresholdRouter, use_kernel

Row = dict[str, Any]
Subject = tuple[nn.Module, Tensor, str]  # a block, its input, and the kernel that is asked for


class Size(NamedTuple):
    tokens: int
    dim: int
    experts: int
    width: int  # of an expert
    per_token: float  # experts, on average

    def __str__(self) -> str:
        tokens, dim, experts, width, per_token = self
        return f"T {tokens:,}, D {dim}, {experts} x {width}, {per_token:g} per token"

    @property
    def capacity(self) -> int:
        """The factor of the paper's way: s, of an FFN 4 x as wide as the model."""
        return max(4 * self.dim // self.width, 1)


A = Size(2048, 512, 64, 256, 6)  # the reference point
SMALL = Size(640, 128, 32, 128, 4.2)  # the demo's and the grids' width
SIZES = (A, A._replace(per_token=2), SMALL, SMALL._replace(per_token=1.4))
# The FLOPs of a dense FFN of 2,048, in ever smaller experts.
GRAINS = tuple(A._replace(experts=e, width=8 * 2048 // e, per_token=e // 8) for e in (8, 32, 64, 128, 256))
DECODED = tuple(Size(tokens, 512, 32, 256, 8) for tokens in (1, 8, 64, 1024))  # FFN 8,192, a quarter taken


def tokens(size: Size, count: int = 0) -> Tensor:
    return torch.randn(count or size.tokens, size.dim, requires_grad=True)


def layer_of(size: Size, x: Tensor) -> MoELayer:
    return moe_layer(x, size.experts, size.width, size.per_token)


def floor_of(size: Size, layer: MoELayer, x: Tensor) -> Subject:
    """The floor under a layer on these tokens: as many rows as it computes."""
    with torch.no_grad():
        num_rows = layer(x)[1].token_R.numel()
    return Floor(size.dim, size.width), tokens(size, num_rows), "auto"


def peers(size: Size, x: Tensor) -> dict[str, Subject]:
    """With a whole number of experts per token; fairscale's wants groups, as many as there are experts."""
    per_token, fits = round(size.per_token), size.tokens % size.experts == 0
    sizes = (size.dim, size.experts, size.width)
    x3 = x.detach().view(size.experts if fits else 1, -1, size.dim)
    blocks = {"Hugging Face, grouped": transformers_block(*sizes, per_token, "grouped_mm")}
    if per_token == 2 and fits:
        blocks["fairscale, top-2"] = fairscale_layer(*sizes)
    return {name: (block, x3.clone().requires_grad_(), "auto") for name, block in blocks.items() if block}


def everything(size: Size) -> dict[str, Subject]:
    """The layer, and what else computes as many FLOPs (the paper's way: more)."""
    x = tokens(size)
    layer = layer_of(size, x)
    slots = {name: with_every_slot(layer, way, size.capacity) for name, way in EVERY_SLOT.items()}
    check_equal(size, layer, x)
    dense = DenseFFN(size.dim, round(size.per_token * size.width))
    return {
        "floor": floor_of(size, layer, x),
        **{kernel: (layer, x, kernel) for kernel in kernels()},
        "dense, equal active width": (dense, x, "auto"),
        **peers(size, x),
        **{name: (other, x, "auto") for name, other in slots.items()},
    }


@torch.no_grad()
def check_equal(size: Size, layer: MoELayer, x: Tensor) -> None:
    """Raises AssertionError: with room for all tokens in every expert the ways differ."""
    few = x[:32]
    with use_kernel("plain"):
        expected = layer(few)[0]
    ways: dict[str, Any] = {
        name: with_every_slot(layer, way, size.experts) for name, way in EVERY_SLOT.items()
    }
    for name, way in (ways | {"layer": layer}).items():
        torch.testing.assert_close(way(few)[0], expected, rtol=1e-4, atol=1e-4, msg=f"{name} differs")


def runs(
    subjects: dict[str, Subject], way: Callable[[nn.Module, Tensor], Callable[[], None]]
) -> dict[str, Callable[[], None]]:
    return {name: use_kernel(kernel)(way(block, x)) for name, (block, x, kernel) in subjects.items()}


def against_others(size: Size, rounds: int) -> Iterator[Row]:
    """No gradients forward; in `forward + backward` those of the input and all parameters."""
    rounds *= 1 if size.tokens > 1000 else 5
    subjects = everything(size)
    for name, way in {"forward": evaluation, "forward + backward": training}.items():
        yield {"case": str(size), "pass": name, "timings": in_turn(runs(subjects, way), rounds)}


def granularity(rounds: int) -> Iterator[Row]:
    """Ever smaller experts at the same FLOPs, all in turn: ratios are to the largest experts."""
    subjects: dict[str, Subject] = {}
    for size in GRAINS:
        x = tokens(size)
        subjects[f"E {size.experts}"] = layer_of(size, x), x, "auto"
    yield {
        "case": f"{GRAINS[0]} to {GRAINS[-1].experts} x {GRAINS[-1].width}", "pass": "forward + backward",
        "timings": in_turn(runs(subjects, training), rounds),
    }  # fmt: skip


def decoding(size: Size, rounds: int) -> Iterator[Row]:
    """The dense FFN of all the experts' width, then a part of the experts, equally many for each token."""
    x = tokens(size).detach()
    dense = DenseFFN(size.dim, size.experts * size.width)
    router = ThresholdRouter(size.dim, size.experts, 1.0, round(size.per_token))
    layer = MoELayer(size.dim, size.width, size.experts, router)
    subjects: dict[str, Subject] = {"dense, all experts' width": (dense, x, "auto")}
    subjects |= {kernel: (layer, x, kernel) for kernel in kernels()} | peers(size, x)
    for block, _, _ in subjects.values():
        block.eval()
    rounds *= 10 if size.tokens <= 64 else 2
    yield {"case": str(size), "pass": "forward", "timings": in_turn(runs(subjects, evaluation), rounds)}


def whole_layer() -> Callable[[], None]:
    x = tokens(A)
    return training(layer_of(A, x), x)


def dense_on_as_many_rows() -> Callable[[], None]:
    x = tokens(A)
    return training(DenseFFN(A.dim, A.width), floor_of(A, layer_of(A, x), x)[1])


def jobs(rounds: int) -> dict[str, list[Callable[[], Iterator[Row]]]]:
    return {
        "layer": [partial(against_others, size, rounds) for size in SIZES],
        "granularity": [partial(granularity, rounds)],
        "decoding": [partial(decoding, size, rounds) for size in DECODED],
    }


def measure(threads: int, rounds: int, sections: list[str]) -> Iterator[Row]:
    torch.set_num_threads(threads)
    chosen = [(name, job) for name in sections for job in jobs(rounds)[name]]
    for name, job in track(chosen, description=f"{threads} thread(s)"):
        torch.manual_seed(1)
        yield from ({"section": name, "threads": threads, **row} for row in job())


def report(results: dict[str, Any]) -> Iterator[str]:
    yield from left_out()
    for section in dict.fromkeys(row["section"] for row in results["rows"]):
        yield ratios(
            [row for row in results["rows"] if row["section"] == section], ("threads", "case", "pass")
        )
    if memory := results.get("peak memory, MB"):
        yield (
            f"Peak memory of forward + backward, {A}: layer {memory['layer']:.0f} MB, dense FFN on as many "
            f"rows {memory['dense']:.0f} MB ({memory['layer'] / memory['dense']:.2f} x)"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common(parser, "layer", rounds=5)
    sections = [*jobs(0), "memory"]
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, metavar="SECTION")
    args = parser.parse_args(arguments)
    only = [name for name in args.only if name != "memory"]
    rows = [row for threads in args.threads for row in measure(threads, args.rounds, only)]
    results: dict[str, Any] = {"rows": rows}
    if "memory" in args.only:
        ways = {"layer": whole_layer, "dense": dense_on_as_many_rows}
        results["peak memory, MB"] = {name: peak_memory_anew(way) for name, way in ways.items()}
    write_table(results, report(results), args.out)


if __name__ == "__main__":
    main()
