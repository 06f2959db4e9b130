"""What a training costs: parameters, FLOPs, memory of a GPU, hours.

The model is built as fairseq's command would build it, but on torch's meta device, and one update is counted
there (`on_meta.py`). What is counted must be what arithmetic gives (`arithmetic.py`).
"""

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from fairseq import tasks
from fairseq.data import Dictionary

from experiments import arithmetic
from experiments.dimensions import Shape
from experiments.on_meta import EXPERTS, Counted, batch, count, ranks
from experiments.plan import Plan
from experiments.shapes import SPECIAL, Text, check_known, experts_of, parse, shape_of
from xmoe_fairseq_compat.errors import FlagError, UserError

PEAKS = {"A100": 312e12, "H100": 989e12}  # FLOP/s: bf16 products of dense matrices, by NVIDIA's data sheets
BESIDE = 1.5e9  # bytes of CUDA's context, NCCL's buffers and the products' work space: assumed
BUCKET = 2**28  # numbers: fairseq's legacy_ddp
TOLERANCE = 0.1  # of kept bytes, between counted and arithmetic, which leaves small tensors out


class Differs(UserError):
    """What a model has is not what arithmetic says."""


@dataclass(frozen=True)
class Found:
    """Of one rank."""

    plan: Plan
    text: Text
    shape: Shape
    experts: tuple[float, float]  # routed ones of a token, at least and at most
    parameters: Counter[str]
    memory: dict[str, float]  # bytes
    batches: float  # of the training, on all GPUs

    @property
    def tokens(self) -> int:
        """Of one side of a batch."""
        return self.shape.tokens(self.shape.stacks[-1])

    def flops(self, per_token: float) -> Counter[str]:
        """Forward, of a batch."""
        return arithmetic.flops(self.shape, per_token)

    def total_flops(self, per_token: float) -> float:
        """Of the training on all GPUs: the backward pass costs twice the forward pass."""
        return 3 * self.flops(per_token).total() * self.batches

    def gpu_hours(self, gpu: str) -> tuple[float, float]:
        """With the least and the most experts: of all GPUs together, however many share them."""
        least, most = (self.total_flops(k) / (PEAKS[gpu] * utilisation()) / 3600 for k in self.experts)
        return least, most

    def gflops(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Forward, of a token: all, and MoE layers."""
        pairs = []
        for k in self.experts:
            flops = self.flops(k)
            moe = sum(flops[part] for part in ("routers", "experts", "beside experts"))
            pairs.append((flops.total() / self.tokens / 1e9, moe / self.tokens / 1e9))
        (least, least_moe), (most, most_moe) = pairs
        return (least, most), (least_moe, most_moe)

    @property
    def gigabytes(self) -> float:
        return sum(self.memory.values()) / 1e9


def utilisation() -> float:
    """Raises FlagError."""
    text = os.environ.get("UTILISATION", "0.3")
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise FlagError(f"UTILISATION must be above 0 and at most 1, got {text}")
    return share


def find(plan: Plan, words: list[str], data: Path) -> Found:
    """
    Args:
        words: behind fairseq-train.

    Raises:
        FlagError: a flag that the arithmetic does not know.
        Differs: see above.
    """
    text, (args, cfg) = Text.of(plan.task, data), parse(words)
    check_known(args)
    shape = shape_of(plan, args, text)
    experts = experts_of(shape, args)
    sample = batch(plan.task, shape.sentences, shape.stacks[-1].length)
    with ranks(plan.gpus if shape.held < shape.experts else 1):
        counted = count(cfg, task_of(plan, cfg, text), sample, experts[1])
    compare(shape, experts[1], counted)
    memory = memory_of(plan, args, shape, experts[1], counted)
    return Found(plan, text, shape, experts, counted.parameters, memory, batches_of(plan, args, shape, text))


def task_of(plan: Plan, cfg: Any, text: Text) -> Any:
    """With dictionaries of the size."""
    entries = Dictionary()
    for number in range(text.dictionary - SPECIAL):
        entries.add_symbol(f"piece{number}")
    kind = tasks.TASK_REGISTRY[cfg.task._name]
    return kind(cfg.task, entries, entries)


def compare(shape: Shape, per_token: float, counted: Counted) -> None:
    """Raises Differs."""
    flops = arithmetic.flops(shape, per_token)
    same("parameters", arithmetic.parameters(shape), counted.parameters)
    columns = arithmetic.bias_columns(shape, per_token)
    grouped = counted.flops[EXPERTS]
    routed = {"experts": grouped - columns, "everything else": counted.flops.total() - grouped}
    expected = {"experts": flops["experts"], "everything else": flops.total() - flops["experts"]}
    same("FLOPs", expected, routed)
    states = shape.precision.states(arithmetic.parameters(shape))
    kept, there = arithmetic.activations(shape, per_token), counted.kept - arithmetic.logits(shape)
    for what, worked_out, found in (("states", states, counted.states), ("activations", kept, there)):
        if abs(found - worked_out) > TOLERANCE * worked_out:
            raise Differs(f"memory of {what} must be {worked_out:,} bytes by arithmetic, counted {found:,}")


def same(what: str, expected: Mapping[str, int], counted: Mapping[str, int]) -> None:
    for part in [*expected, *(counted.keys() - expected.keys())]:
        worked_out, found = expected.get(part, 0), counted.get(part, 0)
        if worked_out != found:
            raise Differs(f"{what} of {part} must be {worked_out:,} by arithmetic, counted {found:,}")


def memory_of(
    plan: Plan, args: Namespace, shape: Shape, per_token: float, counted: Counted
) -> dict[str, float]:
    """Bytes of a GPU. What goes over a network is by arithmetic alone: there is none here."""
    width, numbers = shape.itemsize, counted.parameters.total()
    kept = counted.kept - arithmetic.logits(shape)
    found: dict[str, float] = {"states": counted.states, "activations": kept}
    found["logits and gradients of the loss"] = counted.peak - kept
    if plan.gpus > 1:
        reduced = numbers if args.ddp_backend == "pytorch_ddp" else min(BUCKET, numbers)
        found["buckets"] = width * reduced
    if shape.held < shape.experts:
        reached = arithmetic.ranks_of_a_token(shape.experts // shape.held, shape.experts, per_token)
        rows = sum(stack.moe_layers * shape.tokens(stack) * stack.model_dim for stack in shape.stacks)
        found["rows from other ranks"] = reached * rows * width
    return found | {"beside": BESIDE}


def batches_of(plan: Plan, args: Namespace, shape: Shape, text: Text) -> float:
    """Of the whole training, whichever of updates and epochs ends it."""
    by_epochs = float(args.max_epoch or inf) * text.epoch / shape.tokens(shape.stacks[-1])
    by_updates = float(args.max_update or inf) * plan.gpus * int(args.update_freq[0])
    return min(by_epochs, by_updates)
