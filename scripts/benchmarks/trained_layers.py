"""Times the FFNs of trained models on the inputs that they meet. See benchmark_checkpoints.sh."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.timing import add_rounds, forward, in_turn, machine
from experiments.plan import Plan
from experiments.results import read_run, write_json
from xmoe_fairseq.config import read_field
from xmoe_fairseq.thresholds.checkpoint import open_model

CHECKPOINT = "checkpoint_best.pt"
EVERY = 2  # --moe-freq, where a preset does not say it


def places(model: nn.Module, model_cfg: Any, every: int) -> list[nn.Module]:
    """The layers whose FFN is timed: those with experts, and of a dense model those in their places.

    Args:
        every: such layer has experts in the other models.
    """
    sides = [side for side in ("encoder", "decoder") if hasattr(model, side)]
    sparse = [layer for side in sides for layer in getattr(model, side).layers if hasattr(layer, "moe")]
    return sparse or [
        layer
        for side in sides
        if not read_field(model_cfg, f"no_moe_{side}", False)
        for layer in list(getattr(model, side).layers)[every - 1 :: every]
    ]


def every_of(run: Path) -> int:
    """Of a run's preset."""
    about = read_run(run)
    return int(Plan.of_run(about).size.flags.get("moe-freq", EVERY))


def feed_forward(layer: nn.Module) -> tuple[nn.Module, Callable[..., object]]:
    """The module whose inputs are the FFN's, and the FFN."""
    if hasattr(layer, "moe"):
        return layer.moe, layer.moe
    return layer.fc1, lambda x: layer.fc2(layer.activation_fn(layer.fc1(x)))


class Ffns(NamedTuple):
    """Of a run's model, or the layers in their places."""

    work: Callable[[], None]  # runs them on the inputs that they meet in validation text
    has_experts: bool
    dense_dims: list[int]  # widths, or those of the dense FFNs that the experts replace


@torch.no_grad()
def ffns_of(run: Path, max_tokens: int) -> Ffns:
    model, task, cfg = open_model(run / CHECKPOINT, Path(read_run(run)["data"]))
    task.load_dataset("valid")
    batches = task.get_batch_iterator(
        task.dataset("valid"), max_tokens=max_tokens, max_positions=model.max_positions()
    )
    calls: list[tuple[Callable[..., object], tuple[Tensor | None, ...]]] = []
    handles = []
    layers: list[Any] = places(model, cfg.model, every_of(run))
    for layer in layers:
        module, ffn = feed_forward(layer)
        handles.append(module.register_forward_pre_hook(lambda _, given, ffn=ffn: calls.append((ffn, given))))
    model(**next(batches.next_epoch_itr(shuffle=False))["net_input"])
    for handle in handles:
        handle.remove()

    def work() -> None:
        for ffn, given in calls:
            ffn(*given)

    has_experts = hasattr(layers[0], "moe")
    dims = [layer.moe.dense_ffn_dim if has_experts else layer.fc1.out_features for layer in layers]
    return Ffns(work, has_experts, dims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    add_rounds(parser, default=15)
    parser.add_argument(
        "--tokens", type=int, default=4000, help="at most in the batch (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    ffns = {str(run): ffns_of(run, args.tokens) for run in args.runs}
    first = ffns[str(args.runs[0])]
    functions = {run: forward(own.work) for run, own in ffns.items()}
    for run, timing in in_turn(functions, args.rounds).items():
        print(f"{Path(run).name}: {timing}")
        found = {"milliseconds": timing.milliseconds, "ratio": timing.ratio, "to": args.runs[0].name}
        to_dense_ffn = not first.has_experts and first.dense_dims == ffns[run].dense_dims
        found |= {"to_dense_ffn": to_dense_ffn, "checkpoint": CHECKPOINT}
        write_json(Path(run) / "seconds.json", found | {"machine": machine()})


if __name__ == "__main__":
    main()
