"""What a run's folder says of its training, and what `xmoe-threshold` has measured there."""

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from xmoe_fairseq.explain.collect import title_of
from xmoe_fairseq.explain.pieces import printable
from xmoe_fairseq.load import FILE as LOADS
from xmoe_fairseq.load import TRAINING
from xmoe_fairseq_compat.errors import FlagError, UserError

LOG = "train.log"  # what fairseq-train printed
RECORD = re.compile(r"\| (train_inner|train|valid) \| (.*)")
NUMBER = re.compile(r"([A-Za-z_]\w*)[= ]([-+]?(?:\d[\d.]*(?:e[-+]?\d+)?|nan|inf))(?![\w.])")
EXPERTS = re.compile(r"moe_(?:(encoder|decoder)_)?experts_per_token")
FLOPS = re.compile(r"moe_(?:(encoder|decoder)_)?flops_vs_dense_ffn")
Curve = list[tuple[float, float]]  # (updates, value)
Value = TypeVar("Value")


@dataclass
class Run:
    """What its log says."""

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)  # perplexity: train_inner, train, valid
    experts: dict[str, Curve] = field(default_factory=dict)  # per token, by side
    flops: dict[str, float] = field(default_factory=dict)  # over the dense FFN's, by side, at the end
    seconds: float | None = None  # of an update; the median

    @property
    def learning(self) -> Curve:
        """Perplexity in validation; else in training."""
        groups = ("valid", "train_inner", "train")
        return next((self.curves[group] for group in groups if group in self.curves), [])


def read_run(folder: Path, name: str) -> Run | None:
    """None: it holds no log, or nothing is logged in it."""
    file = folder / LOG
    if not file.is_file():
        return None
    values: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)  # what a resumed run repeats counts
    with file.open(encoding="utf-8", errors="replace") as lines:
        for group, record in (found for line in lines if (found := numbers(line))):
            if update := record.get("num_updates"):
                for key, value in record.items():
                    values[group, key][update] = value
    run = Run(name)
    for (group, key), points in sorted(values.items()):  # train, train_inner, valid: the second counts most
        experts, flops = EXPERTS.fullmatch(key), FLOPS.fullmatch(key)
        if key == "ppl":
            run.curves[group] = sorted(points.items())
        elif key == "ups" and (speeds := [speed for speed in points.values() if speed > 0]):
            run.seconds = statistics.median(1 / speed for speed in speeds)
        elif experts and (group != "valid" or (experts[1] or "") not in run.experts):
            run.experts[experts[1] or ""] = sorted(points.items())
        elif flops and (group != "valid" or (flops[1] or "") not in run.flops):
            run.flops[flops[1] or ""] = points[max(points)]
    run.experts, run.flops = encoder_first(run.experts), encoder_first(run.flops)
    return run if values else None


def encoder_first(by_side: dict[str, Value]) -> dict[str, Value]:
    return {side: by_side[side] for side in sorted(by_side, reverse=True)}


def numbers(line: str) -> tuple[str, dict[str, float]] | None:
    """What fairseq logged in a line as json, simple or tqdm: the group and its numbers, keys without it."""
    record = RECORD.search(line)
    if not record:
        return None
    group, text = record.groups()
    try:
        found = json.loads(text).items() if text.startswith("{") else NUMBER.findall(text)
    except ValueError:  # cut short, when it was killed
        return None
    return group, {key.removeprefix(f"{group}_"): float(v) for key, v in found if is_number(v)}


def is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def read_runs(own: Path, others: Sequence[Path]) -> tuple[Run | None, list[Run]]:
    """That of a checkpoint's folder, if it has a log, and others, by names that differ.

    Raises:
        FlagError: another has no log.
    """
    others = [other for other in others if other.resolve() != own.resolve()]
    names = [folder.resolve().name for folder in (own, *others)]
    unlike = [n if names.count(n) == 1 else str(f) for n, f in zip(names, (own, *others), strict=True)]
    runs = [read_run(f, printable(name)) for f, name in zip((own, *others), unlike, strict=True)]
    for folder, run in zip(others, runs[1:], strict=True):
        if run is None:
            raise FlagError(f"--runs must be folders with {LOG}, what fairseq-train printed, got {folder}")
    return runs[0], [run for run in runs[1:] if run]


def experts_of_layers(folder: Path, shared: Mapping[str, int]) -> dict[str, Curve]:
    """Experts per token in training, by layer, from the file of loads; {} where there is none.

    Args:
        shared: experts, of each layer by its title.

    Raises:
        UserError: the file is damaged.
    """
    file, found = folder / LOADS, defaultdict[str, dict[float, float]](dict)
    try:
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            record = json.loads(line)
            for name, load in record["layers"].items() if record["set"] == TRAINING else ():
                experts = sum(load["rows"]) / load["tokens"] + shared[title_of(name)]
                found[title_of(name)][record["updates"]] = experts
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise UserError(f"{file}: is damaged, or of another model; move it away") from None
    return {name: sorted(points.items()) for name, points in found.items()}


def threshold_reports(checkpoint: Path) -> dict[str, Any]:
    """By file name what `xmoe-threshold` wrote of this checkpoint, or of that which it was found for."""
    found = {}
    for file in sorted(checkpoint.parent.glob("*.json")):
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            of = {file.stem, report["about"].get("checkpoint")}
            if {"reference", "rows", "curve"} <= report.keys() and of & {checkpoint.stem, checkpoint.name}:
                found[printable(file.name)] = report
        except (ValueError, AttributeError, KeyError, TypeError):  # another's
            continue
    return found
