"""What the loads tell while a model trains: experts without tokens, a file, histograms for TensorBoard."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from fairseq import metrics
from fairseq.logging import progress_bar
from fairseq.logging.meters import MetersDict
from torch import nn

from xmoe_fairseq.criterions.routing_log import layer_stats
from xmoe_fairseq.moe import RoutedLayer, RoutingStats, moe_layers
from xmoe_fairseq_compat.files import write_atomically

logger = logging.getLogger(__name__)

FILE = "moe_load.jsonl"  # in --save-dir
TRAINING = "training"  # the name there of what was trained since the epoch began
SHOWN = 20  # experts of a layer in a warning: a choice
DROPPED = 0.1  # a share of choices more than in evaluation, from which on there is a warning: a choice


class LoadReport:
    """Of all ranks' tokens, which fairseq's meters hold; for one rank alone to make.

    Args:
        cfg: fairseq's configuration of the training.
    """

    def __init__(self, cfg: Any, model: nn.Module) -> None:
        self.layers = moe_layers(model)
        self.file = None if cfg.checkpoint.no_save else Path(cfg.checkpoint.save_dir, FILE)
        self.tensorboard: str | None = cfg.common.tensorboard_logdir
        self.interval: int = cfg.common.log_interval
        self._dead: list[str] = []  # of which there was a warning
        self._dropped: set[str] = set()  # sides, likewise

    def after_update(self, update: int) -> None:
        """Warn of experts that nothing was sent to in a whole log interval, unless they are as before."""
        if update % self.interval:
            return
        stats = layer_stats(self.layers, metrics.get_meters("train_inner"))
        dead = [f"{name}: {without_rows(own)}" for name, own in stats.items() if own.dead_experts]
        if dead and dead != self._dead:
            updates = "update" if self.interval == 1 else f"{self.interval} updates"
            logger.warning(f"experts that got no token in the last {updates}: {'; '.join(dead)}")
        self._dead = dead

    def after_validation(self, subset: str, meters: MetersDict, update: int) -> None:
        """Write what was logged of a validated set, and of the epoch's training so far; compare the two."""
        validated = layer_stats(self.layers, meters)
        trained = metrics.get_meters("train") or MetersDict()
        self._compare_dropped(trained, meters)
        if self.file and validated:
            sets = {TRAINING: record(self.layers, trained),
                    subset: record(self.layers, meters)}  # fmt: skip
            try:
                write_records(self.file, update, sets)
            except (OSError, ValueError, KeyError) as error:  # no reason to end the training
                logger.warning(f"{self.file} is not written: {error}")
        # Where there is no TensorBoard fairseq's own progress bar says so.
        if self.tensorboard and progress_bar.SummaryWriter is not None:
            bar = progress_bar.TensorboardProgressBarWrapper(None, self.tensorboard)
            for name, stats in validated.items():
                draw(bar._writer(subset), f"moe_load/{name}", stats.rows_kept_E.tolist(), update)

    def _compare_dropped(self, trained: MetersDict, validated: MetersDict) -> None:
        """Warn once of a side with a capacity in training alone: it never computed so many experts there."""
        limits = {
            (layer.side, getattr(layer, "capacity_factor", 0), getattr(layer, "eval_capacity_factor", 0))
            for layer in self.layers
        }
        for side in sorted({side for side, limit, in_evaluation in limits if limit and not in_evaluation}):
            keys = [f"moe_{side}_{name}" for name in ("dropped_share", "experts_per_token")]
            if side in self._dropped or not all(key in of for key in keys for of in (trained, validated)):
                continue
            shares, experts = ([of.get_smoothed_value(key) for of in (trained, validated)] for key in keys)
            if shares[0] - shares[1] > DROPPED:
                self._dropped.add(side)
                logger.warning(
                    f"{side}: --moe-capacity-factor drops {shares[0]:.0%} of what tokens choose while it"
                    f" trains, and {shares[1]:.0%} in validation: {experts[1]:.1f} experts per token for"
                    f" {experts[0]:.1f}, which the model has not learned. --moe-eval-capacity-factor limits"
                    " evaluation, too (results then depend on the batch)"
                )


def without_rows(stats: RoutingStats) -> str:
    """Such as "2 of 8 (3, 5)"."""
    dead: list[int] = stats.dead_E.nonzero().flatten().tolist()
    listed = ", ".join(map(str, dead[:SHOWN])) + (", ..." if len(dead) > SHOWN else "")
    return f"{len(dead)} of {int(stats.active_E.sum())} ({listed})"


def record(layers: list[RoutedLayer], meters: MetersDict) -> dict[str, Any]:
    """All numbers that are logged, of each side, and those of each layer."""
    logged = {key: meters.get_smoothed_value(key) for key in meters if key.startswith("moe_")}
    shown = {key: value if math.isfinite(value) else None for key, value in logged.items()}  # JSON has no NaN
    return {**shown, "layers": {at: numbers(stats) for at, stats in layer_stats(layers, meters).items()}}


def write_records(file: Path, update: int, sets: dict[str, dict[str, Any]]) -> None:
    """One line for each set of data; those of an earlier run from this update on go.

    Raises:
        OSError, ValueError, KeyError: it cannot be written, or the one that is there is damaged.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    earlier = [(json.loads(line), line) for line in lines]
    kept = [line for old, line in earlier if old["updates"] < update or
            (old["updates"] == update and old["set"] not in sets)]  # fmt: skip
    kept += [json.dumps({"updates": update, "set": name, **own}) for name, own in sets.items()]
    write_atomically(file, "\n".join(kept) + "\n")


def numbers(stats: RoutingStats) -> dict[str, Any]:
    """Of one layer, for the file; counts are whole numbers."""
    return {
        "tokens": int(stats.tokens),
        "rows": stats.rows_kept_E.long().tolist(),
        "first_choices": stats.first_choices_E.long().tolist(),
        "active_experts": int(stats.active_E.sum()),
        "dead_experts": int(stats.dead_experts),
        "max_violation": round(float(stats.max_violation), 4),
        "load_cv": round(float(stats.load_cv), 4),
    }


def draw(writer: Any, tag: str, rows: list[float], update: int) -> None:
    """A histogram whose bins are the experts, not the loads: it shows which expert had how many rows."""
    sums = [sum(count * expert**power for expert, count in enumerate(rows)) for power in range(3)]
    limits = [expert + 0.5 for expert in range(len(rows))]
    writer.add_histogram_raw(tag, -0.5, limits[-1], *sums, limits, rows, update)
