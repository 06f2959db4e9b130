"""Finds t of a trained model on validation data and writes a checkpoint that holds it: pick_threshold.sh."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from omegaconf import OmegaConf
from results import ResultError, check_output
from rich.console import Console
from rich.table import Table
from threshold_meter import Meter, Point

import xmoe_fairseq  # noqa: F401  (registers the models)
from xmoe_fairseq_compat.files import write_atomically

STEPS = 10  # of bisection
ROUNDS = 6  # a layer's t changes what the layers above it see
CLOSE = 1 / 2048  # two thresholds that are one


class Picker:
    """Tries settings of one dial, t or, with a t of its own for each layer, the experts per token."""

    def __init__(self, meter: Meter, per_layer: bool) -> None:
        self.meter, self.per_layer = meter, per_layer
        self.tried: list[Point] = []
        self.dial = (1.0, float(meter.limit)) if per_layer else (0.0, 1.0)

    def at(self, setting: float) -> Point:
        if not self.per_layer:
            return self.measure((setting,) * len(self.meter.routers))
        return self.layers_alike(setting)

    def measure(self, thresholds: tuple[float, ...]) -> Point:
        return self.keep(self.meter.measure(thresholds))

    def keep(self, point: Point) -> Point:
        self.tried.append(point)
        if not sys.stderr.isatty():  # no bar to see
            numbers = f"{point.loss:.4f} bits per token, {point.experts:.3f} experts per token"
            print(f"[pick_threshold] t {thresholds_text(point)}: {numbers}", flush=True)
        return point

    def layers_alike(self, budget: float) -> Point:
        """Each layer takes `budget` experts on average.

        A layer's t depends on those below it only, so from the lowest up they come to rest.
        """
        thresholds = self.tried[-1].thresholds
        for _ in range(ROUNDS):
            point = self.meter.measure(thresholds, budget)
            if max(abs(t - new) for t, new in zip(thresholds, point.wanted, strict=True)) < CLOSE:
                break
            thresholds = point.wanted
        return self.keep(point)

    def for_budget(self, budget: float) -> Point:
        """The largest t at which a token takes at most `budget` experts on average."""
        if not 1 <= budget <= self.meter.limit:
            raise ResultError(
                f"--budget must be from 1 to {self.meter.limit}, what a token may take, got {budget:g}"
            )
        if self.per_layer:
            return self.at(budget)
        if (most := self.at(1.0)).experts <= budget:
            return most
        return self.bisect(lambda point: point.experts <= budget, self.at(0.0), 0.0, 1.0)

    def for_loss(self, more: float) -> Point:
        """The smallest t whose loss is at most that of the checkpoint as it is and `more`.

        The loss need not fall with t: a model takes badly to more experts than it was trained with. So from
        below, in tenths, to the first that is good enough.
        """
        if more < 0:
            raise ResultError(f"--max-loss must be 0 or more bits per token, got {more:g}")
        allowed, (low, high) = self.tried[0].loss + more, self.dial
        for tenth in range(11):
            setting = low + (high - low) * tenth / 10
            if (point := self.at(setting)).loss <= allowed:
                break
        else:
            raise ResultError(
                f"--max-loss {more:g}: no t has a loss of {allowed:.4f} bits per token or less "
                f"(as it is: {self.tried[0].loss:.4f})"
            )
        if tenth == 0:
            return point
        step = (high - low) / 10
        # From good enough to not: the dial runs down.
        return self.bisect(lambda tried: tried.loss <= allowed, point, setting, setting - step)

    def bisect(self, good: Callable[[Point], bool], best: Point, inside: float, outside: float) -> Point:
        """The last good point on the way from `inside`, where `best` was measured, to `outside`."""
        for _ in range(STEPS):
            if abs(outside - inside) < CLOSE:
                break
            middle = (inside + outside) / 2
            if good(point := self.at(middle)):
                inside, best = middle, point
            else:
                outside = middle
        return best


def show(tried: list[Point], picked: Point) -> None:
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(title="Validation set")
    for title in ("", "t", "bits per token", "perplexity", "experts per token", "MoE FLOPs / dense FFN"):
        table.add_column(title, justify="right" if title else "left")
    rows = [("as it is", tried[0])]
    rows += [
        ("picked" if point is picked else "", point)
        for point in sorted(tried[1:], key=lambda point: point.experts)
    ]
    for name, point in rows:
        table.add_row(
            name, thresholds_text(point), f"{point.loss:.4f}", f"{point.perplexity:.3f}",
            f"{point.experts:.3f}", f"{point.flops:.3f}",
        )  # fmt: skip
    console.print(table)


def thresholds_text(point: Point) -> str:
    values = point.thresholds if len(set(point.thresholds)) > 1 else point.thresholds[:1]
    return ",".join(f"{t:.6g}" for t in values)


def save(checkpoint: Path, output: Path, picked: Point) -> None:
    """The same model whose configuration holds the thresholds; without the optimizer's state."""
    state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
    state.pop("last_optimizer_state", None)
    config = OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True)
    alike = len(set(picked.thresholds)) == 1
    config["model"] |= {
        "moe_target_experts_per_token": 0.0,
        "moe_threshold": picked.thresholds[0] if alike else config["model"]["moe_threshold"],
        "moe_layer_thresholds": "" if alike else thresholds_text(picked),
    }
    state["cfg"] = config
    state["model"] = {
        name: value for name, value in state["model"].items() if not name.endswith(".router.budget.threshold")
    }
    write_atomically(output, lambda file: torch.save(state, file))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pick_threshold", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of data-prep")
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--budget", type=float, metavar="B", help="experts per token, on average at most")
    aim.add_argument("--max-loss", type=float, metavar="X", help="bits per token above the checkpoint's loss")
    parser.add_argument("--per-layer", action="store_true", help="each layer its own t")
    parser.add_argument("--output", type=Path, help="default: CHECKPOINT with .picked.pt")
    args = parser.parse_args()
    args.output = args.output or args.checkpoint.with_suffix(".picked.pt")
    return args


def main() -> None:
    args = parse()
    try:
        check_output(args.output, args.checkpoint)
        if not args.output.parent.is_dir():
            raise ResultError(f"--output: there is no folder {args.output.parent}")
        meter = Meter(args.checkpoint, args.data)
        picker = Picker(meter, args.per_layer)
        picker.measure(tuple(meter.as_it_is))
        picked = picker.for_loss(args.max_loss) if args.budget is None else picker.for_budget(args.budget)
    except ResultError as error:
        raise SystemExit(f"pick_threshold: {error}") from None
    show(picker.tried, picked)
    save(args.checkpoint, args.output, picked)
    print(f"[pick_threshold] t {thresholds_text(picked)} -> {args.output}")


if __name__ == "__main__":
    main()
