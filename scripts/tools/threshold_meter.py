"""A trained model on its validation set, with any thresholds: loss, experts per token, MoE FLOPs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from results import ResultError
from tqdm import tqdm

from xmoe_fairseq.convert.data import Batches
from xmoe_fairseq.convert.measure import measure_sparse
from xmoe_fairseq.moe import Budget, MoELayer, Routing, ThresholdRouter, moe_layers
from xmoe_fairseq.moe.budget import threshold_for

MAX_TOKENS = 4096  # in a batch, where the checkpoint was trained by --batch-size


@dataclass(frozen=True)
class Point:
    """One pass over the validation set."""

    thresholds: tuple[float, ...]  # of each MoE layer
    loss: float  # bits per token
    experts: float  # per token, on average over layers
    flops: float  # of the MoE layers over the dense FFNs'
    wanted: tuple[float, ...] = ()  # of each layer, to meet the budget that was asked for

    @property
    def perplexity(self) -> float:
        return float(2**self.loss)


class Shown(Batches):
    """With a progress bar on a terminal; after the first pass it knows how many there are."""

    text, number = "", None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        seen = 0
        for batch in tqdm(
            super().__iter__(), self.text, self.number, leave=False, unit="batch", disable=None
        ):
            seen += 1
            yield batch
        self.number = seen


class Meter:
    """Loads a checkpoint once and runs it over the validation set as often as asked.

    Raises:
        ResultError: no such file or data, or no threshold routers.
    """

    def __init__(self, checkpoint: Path, data: Path) -> None:
        if not checkpoint.is_file():
            problem = "is a folder, no checkpoint" if checkpoint.is_dir() else "No such file"
            raise ResultError(f"CHECKPOINT {checkpoint}: {problem}")
        if not list((data / "bin").glob("valid*.idx")):
            raise ResultError(f"--data must be a folder of data-prep with bin/valid... in it, got {data}")
        state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
        overrides: dict[str, Any] = {"data": str(data / "bin")}
        if "eval_bleu" in state["cfg"].task:  # one that was chosen by BLEU would translate at each validation
            overrides["eval_bleu"] = False
        models, self.cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], overrides)
        self.task, self.model = task, models[0].eval()
        self.routers = [getattr(layer, "router", None) for layer in moe_layers(self.model)]
        if not self.routers or not all(isinstance(router, ThresholdRouter) for router in self.routers):
            raise ResultError(f"CHECKPOINT must be of a model with --moe-router threshold, got {checkpoint}")
        self.as_it_is = [float(router.threshold_in_use) for router in self.routers]
        if torch.cuda.is_available() and not self.cfg.common.cpu:
            self.model.cuda()
        max_tokens = self.cfg.dataset.max_tokens_valid or MAX_TOKENS
        self.batches = Shown(self.task, "valid", limit=2**62, max_tokens=max_tokens, seed=1)

    @property
    def limit(self) -> int:
        """Experts that a token may take."""
        return self.routers[0].limit

    def set(self, thresholds: tuple[float, ...]) -> None:
        for router, threshold in zip(self.routers, thresholds, strict=True):
            router.threshold, router.budget = threshold, None

    def measure(self, thresholds: tuple[float, ...], budget: float = 0.0) -> Point:
        """
        Args:
            budget: experts per token; not 0 = say also which t each layer would need for that.
        """
        self.set(thresholds)
        counters = {layer: Budget(budget, layer.num_experts) for layer in moe_layers(self.model) if budget}

        def count(layer: MoELayer, routing: Routing) -> None:
            counters[layer].count(layer.router.candidates(routing.probs_TE)[0])

        self.batches.text = "t " + " ".join(f"{threshold:.4g}" for threshold in sorted(set(thresholds)))
        quality = measure_sparse(self.model, self.batches, count if budget else None)
        bits = quality.loss / math.log(2)
        wanted = wanted_by([*counters.values()])
        return Point(thresholds, bits, quality.experts_per_token, quality.flops, wanted)


def wanted_by(counters: list[Budget]) -> tuple[float, ...]:
    if not counters:
        return ()
    counts_LB = torch.stack([counter.pop_counts() for counter in counters])
    target_L = torch.tensor([counter.target for counter in counters], dtype=torch.float64)
    return tuple(round(t, 6) for t in threshold_for(counts_LB, target_L).tolist())
