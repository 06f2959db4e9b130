"""Times whole models, dense and sparse, decoding and scoring, and FFNs alone. See benchmark_decoding.sh."""

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.language_model import HEADS, LENGTH, Models, Shape, inputs_of_shape, random_models
from benchmarks.subjects import DenseFFN, kernels, kernels_left_out
from benchmarks.tables import ratios, write_table
from benchmarks.timing import add_common, forward, in_turn
from xmoe_fairseq.batches import Batches, binarised_folders
from xmoe_fairseq.convert.models import read_dense, read_sparse
from xmoe_fairseq.moe import MoELayer, ThresholdRouter, moe_layers, record_routing, use_kernel
from xmoe_fairseq.moe.records import fix_thresholds
from xmoe_fairseq.thresholds.search import bisect
from xmoe_fairseq.transformer_layers import MoEDecoderLayer, MoEEncoderLayer

BATCHES = (1, 8, 64)
STEPS = 16  # tokens decoded
FFN_TOKENS = (1, 8, 64, 1024, 4096)
SHARE = 0.25  # of the experts
FREE = "no experts"
MEANING = (
    "By kernel, and without experts: time over the dense model's, median (quartiles of the rounds). At most: "
    "as many times as fast, if routers and experts took no time."
)
Row = dict[str, Any]


def steer(model: nn.Module, run: Callable[[], Any], share: float) -> float:
    """Set one t for all layers so that this run takes about so many of the experts; returns what it takes."""

    def enough(threshold: float) -> bool:
        set_threshold(model, threshold)
        return share_taken(model, run) >= share

    set_threshold(model, bisect(enough, 1.0, 0.0, precision=2**-12))
    return share_taken(model, run)


def set_threshold(model: nn.Module, threshold: float) -> None:
    fix_thresholds(model, [threshold] * len(moe_layers(model)))


def share_taken(model: nn.Module, run: Callable[[], Any]) -> float:
    with torch.no_grad(), record_routing(model) as records:
        run()
    return sum(r.experts_per_token / r.num_experts for _, r in records) / len(records)


def decode(model: Any, inputs: dict[str, Tensor], steps: int) -> Callable[[], None]:
    """Greedy, with the states that the generator keeps; stops after `steps` tokens, not at an end."""

    def run() -> None:
        state: dict[str, Any] = {}
        more = {}
        if hasattr(model, "encoder"):
            more["encoder_out"] = model.encoder(inputs["src_tokens"], inputs["src_lengths"])
        tokens = inputs.get("prev_output_tokens", inputs["src_tokens"])[:, :1]
        for _ in range(steps):
            logits = model.decoder(tokens, incremental_state=state, **more)[0][:, -1]
            tokens = torch.cat([tokens, logits.argmax(dim=1, keepdim=True)], dim=1)

    return forward(run)


def score(model: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    return forward(lambda: model(**inputs)[0])


def without_experts(model: nn.Module) -> nn.Module:
    """A copy whose MoE layers hand tokens on, and take no time: no router and no experts could be faster."""
    model = copy.deepcopy(model)
    for layer in [*model.modules()]:
        if isinstance(layer, MoEEncoderLayer | MoEDecoderLayer):
            layer.fc1 = nn.Identity()
    return model


def compared(
    what: str, batch: int, tokens: int, dense: Callable[[], None], model: nn.Module,
    sparse: Callable[[], None], rounds: int, free: Callable[[], None] | None = None,
) -> Row:  # fmt: skip
    """The sparse model by each kernel, the one that is chosen first; and with experts that take no time."""
    functions = {"dense": dense} | {kernel: use_kernel(kernel)(sparse) for kernel in kernels()}
    timings = in_turn(functions | ({FREE: free} if free else {}), rounds)
    return {
        "what": what, "batch": batch, "tokens": tokens, "experts taken": f"{share_taken(model, sparse):.2f}",
        "times as fast": f"{1 / timings[kernels()[0]].ratio:.2f}",
        "at most": f"{1 / timings[FREE].ratio:.2f}" if free else "", "timings": timings,
    }  # fmt: skip


def whole_models(models: Models, make: Callable[[int], dict[str, Tensor]], rounds: int) -> Iterator[Row]:
    dense, sparse = models
    free = without_experts(sparse)
    for batch in track(BATCHES, "whole models", transient=True):
        inputs = make(batch)
        tokens = inputs.get("prev_output_tokens", inputs["src_tokens"]).numel()
        for what, count, run in (
            ("decoding", batch * STEPS, partial(decode, inputs=inputs, steps=STEPS)),
            ("scoring", tokens, partial(score, inputs=inputs)),
        ):
            yield compared(what, batch, count, run(dense), sparse, run(sparse), rounds, run(free))


def ffns(shape: Shape, rounds: int) -> Iterator[Row]:
    """One FFN alone; tokens that take about a quarter of the experts each."""
    _, dim, ffn, experts = shape
    layer = MoELayer(dim, ffn // experts, experts, ThresholdRouter(dim, experts), combine="ones").eval()
    layer.router.weight.data.mul_(3.0)
    dense, x_TD = DenseFFN(dim, ffn).eval(), torch.randn(max(FFN_TOKENS), dim)
    steer(layer, lambda: layer(x_TD), SHARE)
    with torch.no_grad():
        taken_T = layer(x_TD)[1].token_R.bincount(minlength=len(x_TD))
    nearest_first = (taken_T - SHARE * experts).abs().argsort(stable=True)
    for count in track(FFN_TOKENS, "FFNs", transient=True):
        x = x_TD if count == len(x_TD) else x_TD[nearest_first[:count]]
        runs = forward(lambda x=x: dense(x)), layer, forward(lambda x=x: layer(x)[0])
        yield compared("FFN alone", count, count, *runs, rounds * (10 if count <= 64 else 1))


def inputs_of_data(task: Any, batch: int) -> dict[str, Tensor]:
    """Sentences of validation text, from the batch that holds the most of them."""
    most = max(batch * LENGTH, 1024)  # a batch holds the longest sentence at least
    samples = list(Batches(task, "valid", 2 * most, most, seed=1))
    largest = max(samples, key=lambda sample: sample["net_input"]["src_tokens"].size(0))
    return {name: value[:batch] for name, value in largest["net_input"].items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    shape = "random weights: layers, D, FFN and experts"
    parser.add_argument("--shape", type=int, nargs="*", metavar="N", help=shape)
    for name in ("dense", "sparse", "data"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--threshold", type=float, metavar="T", help="instead of the checkpoint's own")
    add_common(parser, "decoding", rounds=5)
    args = parser.parse_args()
    given = (args.dense, args.sparse, args.data)
    if (args.shape is not None) == all(given) or (args.shape is not None and args.threshold is not None):
        parser.error("give --shape, or --dense, --sparse and --data, and with these --threshold")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold must be in [0, 1], got {args.threshold:g}")
    if args.shape is not None:
        sizes = args.shape or Shape()
        if len(sizes) != len(Shape()) or min(sizes) < 1 or sizes[1] % HEADS or sizes[2] % sizes[3]:
            rule = f"layers, D (a multiple of {HEADS}), FFN and experts, which divide FFN"
            parser.error(f"--shape must be four numbers, {rule}; got {' '.join(map(str, sizes))}")
        args.shape = Shape(*sizes)
    return args


def main() -> None:
    args = parse()
    torch.manual_seed(1)
    if args.shape:
        models, make = random_models(args.shape), inputs_of_shape
        steer(models[1], score(models[1], make(8)), SHARE)
    else:
        dense = read_dense(args.dense, binarised_folders(args.data, "--data"))
        models = (dense.model, read_sparse(args.sparse, dense.task))
        if args.threshold is not None:
            set_threshold(models[1], args.threshold)
        make = partial(inputs_of_data, dense.task)
    rows: list[Row] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        found = [*whole_models(models, make, args.rounds)]
        found += ffns(args.shape, args.rounds) if args.shape else []
        rows += ({"threads": threads, **row} for row in found)
    table = ratios(rows, ("threads", "what", "batch", "tokens", "experts taken", "times as fast", "at most"))
    write_table({"rows": rows}, [*kernels_left_out(), MEANING, table], args.out)


if __name__ == "__main__":
    main()
