"""Times an MoE layer on a GPU against dense products of its FLOPs, loops and peers. See benchmark_gpu.sh."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.gpu_subjects import PADDED, BatchOfOne, megablocks_layer
from benchmarks.subjects import Floor, output_of, transformers_block
from benchmarks.tables import write_table
from benchmarks.timing import add_rounds, forward, forward_backward, in_turn, leaves_of
from xmoe_fairseq.moe import MoELayer, ThresholdRouter, use_kernel
from xmoe_fairseq.moe.stats import ffn_flops
from xmoe_fairseq.tables import markdown

FLOOR, OURS = "two dense products", "XMoE layer"
AIM = 0.75  # of the dense products' rate
WAYS = {"grouped products": "grouped", "plain autograd": "plain", "torchtitan's way, padded groups": PADDED}
Case = argparse.Namespace
Row = dict[str, Any]


def tokens(case: Case) -> Tensor:
    shape = (case.tokens, case.model_dim)
    return torch.randn(shape, device=case.device, dtype=case.dtype, requires_grad=True)


def xmoe_layer(case: Case) -> MoELayer:
    """Every token takes exactly `per_token` experts: t = 1, cut off."""
    router = ThresholdRouter(case.model_dim, case.experts, 1.0, case.per_token)
    layer = MoELayer(case.model_dim, case.expert_dim, case.experts, router)
    return layer.to(case.device, case.dtype)


def peers(case: Case) -> dict[str, nn.Module]:
    sizes = (case.model_dim, case.experts, case.expert_dim, case.per_token)
    ways = ("grouped", "sparse")
    found = {f"MegaBlocks, {way}": megablocks_layer(*sizes, case.device, way) for way in ways}
    for way in ("eager", "grouped_mm"):
        block = transformers_block(*sizes, way)
        found[f"transformers Mixtral, {way}"] = block and BatchOfOne(block.to(case.device, case.dtype))
    return {name: block for name, block in found.items() if block is not None}


def subjects(case: Case, x: Tensor) -> Iterator[tuple[str, Callable[[], Tensor], list[Tensor]]]:
    """Name, output, and the tensors that get gradients."""
    floor = Floor(case.model_dim, case.expert_dim).to(case.device, case.dtype)
    rows = torch.randn(case.tokens * case.per_token, case.model_dim).to(x).requires_grad_()
    yield FLOOR, lambda: floor(rows), leaves_of(floor, rows)
    layer = xmoe_layer(case)
    yield OURS, output_of(layer, x), leaves_of(layer, x)
    for name, kernel in WAYS.items():
        yield name, use_kernel(kernel)(output_of(layer, x)), leaves_of(layer, x)
    for name, block in peers(case).items():
        yield name, output_of(block, x), leaves_of(block, x)


def against_floor(case: Case) -> Row:
    x = tokens(case)
    one_way, both_ways, waits = {}, {}, {}
    for name, output, leaves in subjects(case, x):
        with torch.no_grad():
            grad_y = torch.randn_like(output())
        one_way[name], both_ways[name] = forward(output), forward_backward(output, leaves, grad_y)
        waits[name] = host_waits(one_way[name]) if x.is_cuda else None
    return {
        "forward": in_turn(one_way, case.rounds, case.calls),
        "forward + backward": in_turn(both_ways, case.rounds, case.calls),
        "host waits in the forward": waits,
    }


def host_waits(run: Callable[[], object]) -> int:
    """How often the host waited for the GPU, as torch's sync debug mode sees it."""
    run()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def routing_compiled(case: Case) -> Row:
    """Router and permutation, forward + backward, as they are and under torch.compile."""
    x, layer = tokens(case), xmoe_layer(case)

    def route(x: Tensor) -> Tensor:
        routing = layer.router(x)
        rows = layer.dispatcher.dispatch(x, routing)[1]
        assert rows.weight_R is not None
        return torch.cat([rows.weight_R, routing.load_balance_loss.view(1), rows.counts_E])

    compiled = torch.compile(route, backend=case.compile_backend)
    counters.clear()
    grad = torch.randn_like(compiled(x))
    graphs = counters["stats"]["unique_graphs"]
    leaves = [x, layer.router.weight]
    timings = {
        name: forward_backward(lambda way=way: way(x), leaves, grad)  # type: ignore[arg-type]
        for name, way in {"eager": route, f"compiled, {graphs} graphs": compiled}.items()
    }
    return {"router and permutation": in_turn(timings, case.rounds, case.calls)}


def report(results: dict[str, Any]) -> list[str]:
    """The rate of a way is the dense products' time over its own: the FLOPs are equal."""
    titles = ("", "forward, ms", "rate / dense", "with backward, ms", "rate / dense", "TFLOP/s", "host waits")
    rows = []
    for name, both in results["forward + backward"].items():
        one, waits = results["forward"][name], results["host waits in the forward"][name]
        rows.append([
            name, f"{one.milliseconds:.2f}", f"{1 / one.ratio:.2f}", f"{both.milliseconds:.2f}",
            f"{1 / both.ratio:.2f} ({1 / both.high:.2f} to {1 / both.low:.2f})",
            f"{3 * results['forward FLOPs'] / both.milliseconds / 1e9:.1f}",
            "not on a GPU" if waits is None else str(waits),
        ])  # fmt: skip
    reached = 1 / results["forward + backward"][OURS].ratio
    last = f"Aim: {AIM:.0%} of the dense products' rate; the layer reaches {reached:.0%}."
    if routing := results.get("router and permutation"):
        last += "\nRouter and permutation: " + "; ".join(
            f"{name} {timing}" for name, timing in routing.items()
        )
    return [results["shape"], markdown(titles, rows), last]


def measure(case: Case) -> dict[str, Any]:
    shape = (
        f"{case.dtype}, T {case.tokens}, D {case.model_dim}, E {case.experts}, width {case.expert_dim}, "
        f"{case.per_token} experts per token"
    )
    flops = ffn_flops(case.tokens * case.per_token, case.model_dim, case.expert_dim)
    results = {"shape": shape, "forward FLOPs": flops, **against_floor(case)}
    return results | (routing_compiled(case) if case.compile_backend != "none" else {})


def parse(arguments: list[str] | None) -> Case:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda", help="cpu: to try the script")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    sizes = {"tokens": 16384, "model-dim": 768, "experts": 64, "expert-dim": 384, "per-token": 8}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    add_rounds(parser, default=20)
    parser.add_argument("--calls", type=int, default=10, help="of one way in a turn, before the host waits")
    parser.add_argument("--compile-backend", default="inductor", help="of torch.compile; none = leave it out")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_gpu"), help="folder")
    case = parser.parse_args(arguments)
    if case.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark_gpu: --device cuda needs a CUDA device, torch finds none; on a CPU: --device cpu")
    if not 1 <= case.per_token <= case.experts:
        parser.error(f"--per-token must be in [1, --experts = {case.experts}], got {case.per_token}")
    case.dtype = getattr(torch, case.dtype)
    return case


def main(arguments: list[str] | None = None) -> None:
    case = parse(arguments)
    torch.manual_seed(1)
    results = measure(case)
    write_table(results, report(results), case.out)


if __name__ == "__main__":
    main()
