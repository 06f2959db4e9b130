"""Times the FFNs of trained models on the inputs that they meet. See benchmark_checkpoints.sh."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import add_rounds, forward, in_turn, machine
from experiments.results import read_run, write_json
from xmoe_fairseq.config import read_field
from xmoe_fairseq.thresholds.checkpoint import open_model

DENSE_PLACES = slice(1, None, 2)  # of a dense model the layers that have experts in the others


def places(model: nn.Module, model_cfg: Any) -> list[nn.Module]:
    """The layers whose FFN is timed: those with experts, and of a dense model those in their places."""
    sides = [side for side in ("encoder", "decoder") if hasattr(model, side)]
    sparse = [layer for side in sides for layer in getattr(model, side).layers if hasattr(layer, "moe")]
    return sparse or [
        layer
        for side in sides
        if not read_field(model_cfg, f"no_moe_{side}", False)
        for layer in list(getattr(model, side).layers)[DENSE_PLACES]
    ]


def feed_forward(layer: nn.Module) -> tuple[nn.Module, Callable[..., object]]:
    """The module whose inputs are the FFN's, and the FFN."""
    if hasattr(layer, "moe"):
        return layer.moe, layer.moe
    return layer.fc1, lambda x: layer.fc2(layer.activation_fn(layer.fc1(x)))


@torch.no_grad()
def work_of(run: Path, max_tokens: int) -> Callable[[], None]:
    """What runs the FFNs of a run's model on the inputs that they meet in validation text."""
    model, task, cfg = open_model(run / "checkpoint_best.pt", Path(read_run(run)["data"]))
    task.load_dataset("valid")
    batches = task.get_batch_iterator(
        task.dataset("valid"), max_tokens=max_tokens, max_positions=model.max_positions()
    )
    calls: list[tuple[Callable[..., object], tuple[Tensor | None, ...]]] = []
    handles = []
    for layer in places(model, cfg.model):
        module, ffn = feed_forward(layer)
        handles.append(module.register_forward_pre_hook(lambda _, given, ffn=ffn: calls.append((ffn, given))))
    model(**next(batches.next_epoch_itr(shuffle=False))["net_input"])
    for handle in handles:
        handle.remove()

    def work() -> None:
        for ffn, given in calls:
            ffn(*given)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    add_rounds(parser, default=15)
    parser.add_argument(
        "--tokens", type=int, default=4000, help="at most in the batch (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    functions = {str(run): forward(work_of(run, args.tokens)) for run in args.runs}
    for run, timing in in_turn(functions, args.rounds).items():
        print(f"{Path(run).name}: {timing}")
        found = {"milliseconds": timing.milliseconds, "ratio": timing.ratio, "to": args.runs[0].name}
        write_json(Path(run) / "seconds.json", found | {"machine": machine()})


if __name__ == "__main__":
    main()
