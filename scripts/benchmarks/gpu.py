"""Times an MoE layer on a GPU against dense products of its FLOPs, loops and peers. See benchmark_gpu.sh."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.gpu_subjects import TORCHTITAN, BatchOfOne, megablocks_layer
from benchmarks.subjects import Floor, output_of, transformers_block
from benchmarks.tables import write_table
from benchmarks.timing import add_rounds, forward, forward_backward, host_waits, in_turn, leaves_of
from xmoe_fairseq.moe import MoELayer, ThresholdRouter, use_kernel
from xmoe_fairseq.moe.experts.kernels import AUTO
from xmoe_fairseq.moe.stats import ffn_flops
from xmoe_fairseq.tables import markdown

FLOOR, OURS = "two dense products", "XMoE layer"
AIM = 0.75  # of the dense products' rate
WAYS = {"grouped products": "grouped", "plain autograd": "plain", "torchtitan's way": TORCHTITAN}
Case = argparse.Namespace
Row = dict[str, Any]
Subject = tuple[Callable[[], Tensor], list[Tensor]]  # its output, and the tensors that get gradients


def tokens(case: Case) -> Tensor:
    shape = (case.tokens, case.model_dim)
    return torch.randn(shape, device=case.device, dtype=case.dtype, requires_grad=True)


def xmoe_layer(case: Case) -> MoELayer:
    """Every token takes exactly `per_token` experts: t = 1, cut off."""
    router = ThresholdRouter(case.model_dim, case.experts, 1.0, case.per_token)
    layer = MoELayer(case.model_dim, case.expert_dim, case.experts, router)
    return layer.to(case.device, case.dtype)


def subjects(case: Case, x: Tensor) -> dict[str, Callable[[], Subject]]:
    """Each is made when its turn comes; who lacks something raises."""
    layer = xmoe_layer(case)

    def floor() -> Subject:
        products = Floor(case.model_dim, case.expert_dim).to(case.device, case.dtype)
        rows = torch.randn(case.tokens * case.per_token, case.model_dim).to(x).requires_grad_()
        return lambda: products(rows), leaves_of(products, rows)

    def ours(kernel: str) -> Subject:
        return use_kernel(kernel)(output_of(layer, x)), leaves_of(layer, x)

    def block(make: Callable[..., nn.Module | None], *arguments: Any) -> Subject:
        if (made := make(*sizes, *arguments)) is None:
            raise ImportError("is not installed")
        module = BatchOfOne(made) if make is transformers_block else made
        module = module.to(case.device, case.dtype)
        return output_of(module, x), leaves_of(module, x)

    sizes = (case.model_dim, case.experts, case.expert_dim, case.per_token)
    megablocks = (megablocks_layer, case.device, case.dtype)
    return {
        FLOOR: floor,
        OURS: partial(ours, AUTO),
        **{name: partial(ours, kernel) for name, kernel in WAYS.items()},
        **{f"MegaBlocks, {way}": partial(block, *megablocks, way) for way in ("grouped", "sparse")},
        **{
            f"transformers Mixtral, {way}": partial(block, transformers_block, way)
            for way in ("eager", "grouped_mm")
        },
    }


def against_floor(case: Case) -> Row:
    x = tokens(case)
    one_way, both_ways, waits, failed = {}, {}, {}, {}
    for name, make in subjects(case, x).items():
        try:
            output, leaves = make()
            with torch.no_grad():
                grad_y = torch.randn_like(output())
            passes = forward(output), forward_backward(output, leaves, grad_y)
            passes[1]()
        except Exception as error:  # of other people's code, which may not fit what is installed here
            if name in (FLOOR, OURS):
                raise
            failed[name] = reason(error)
            continue
        one_way[name], both_ways[name] = passes
        waits[name] = waits_of(one_way[name]) if x.is_cuda else None
    return {
        "forward": in_turn(one_way, case.rounds, case.calls),
        "forward + backward": in_turn(both_ways, case.rounds, case.calls),
        "host waits in the forward": waits,
        "failed": failed,
    }


def waits_of(run: Callable[[], object]) -> int:
    with host_waits() as waited:
        run()
    return len(waited)


def reason(error: Exception) -> str:
    """In one line that fits a table's cell."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}".replace("|", "/")[:120]


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
    rows += [[name, why, *[""] * (len(titles) - 2)] for name, why in results["failed"].items()]
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
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
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
