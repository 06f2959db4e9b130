"""A trained model on its validation set, with any thresholds: loss, experts per token, MoE FLOPs."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from results import ResultError
from rich.progress import Progress

from xmoe_fairseq.moe import Budget, ThresholdRouter, moe_layers, record_routing
from xmoe_fairseq.moe.budget import threshold_for


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


class Meter:
    """Loads a checkpoint once and runs it over the validation set as often as asked.

    Raises:
        ResultError: no such file or data, or no threshold routers.
    """

    def __init__(self, checkpoint: Path, data: Path) -> None:
        if not checkpoint.is_file():
            raise ResultError(f"CHECKPOINT {checkpoint}: No such file")
        if not list((data / "bin").glob("valid*.idx")):
            raise ResultError(f"--data must be a folder of data-prep with bin/valid... in it, got {data}")
        # A checkpoint that was chosen by BLEU would translate at each validation.
        overrides = {"data": str(data / "bin"), "eval_bleu": False}
        models, self.cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], overrides)
        self.task, self.model = task, models[0].eval()
        self.routers = [getattr(layer, "router", None) for layer in moe_layers(self.model)]
        if not self.routers or not all(isinstance(router, ThresholdRouter) for router in self.routers):
            raise ResultError(f"CHECKPOINT must be of a model with --moe-router threshold, got {checkpoint}")
        self.as_it_is = [float(router.threshold_in_use) for router in self.routers]
        self.on_gpu = torch.cuda.is_available() and not self.cfg.common.cpu
        if self.on_gpu:
            self.model.cuda()
        self.criterion = self.task.build_criterion(self.cfg.criterion).eval()
        self.batches = self._read("valid")
        self.progress = Progress(transient=True)

    @property
    def limit(self) -> int:
        """Experts that a token may take."""
        return self.routers[0].limit

    def _read(self, split: str) -> list[dict[str, Any]]:
        dataset_cfg = self.cfg.dataset
        self.task.load_dataset(split, combine=False, epoch=1, task_cfg=self.cfg.task)
        iterator = self.task.get_batch_iterator(
            dataset=self.task.dataset(split),
            max_tokens=dataset_cfg.max_tokens_valid,
            max_sentences=dataset_cfg.batch_size_valid,
            max_positions=utils.resolve_max_positions(self.task.max_positions(), self.model.max_positions()),
            ignore_invalid_inputs=dataset_cfg.skip_invalid_size_inputs_valid_test,
            required_batch_size_multiple=dataset_cfg.required_batch_size_multiple,
        )
        return list(iterator.next_epoch_itr(shuffle=False))

    def set(self, thresholds: tuple[float, ...]) -> None:
        for router, threshold in zip(self.routers, thresholds, strict=True):
            router.threshold, router.budget = threshold, None

    def measure(self, thresholds: tuple[float, ...], budget: float = 0.0) -> Point:
        """
        Args:
            budget: experts per token; not 0 = say also which t each layer would need for that.
        """
        self.set(thresholds)
        counters = [Budget(budget, router.num_experts) for router in self.routers] if budget else []
        sums: Counter[str] = Counter()
        text = "t " + " ".join(f"{threshold:.4g}" for threshold in sorted(set(thresholds)))
        for batch in self.progress.track(self.batches, description=text):
            sample = utils.move_to_cuda(batch) if self.on_gpu else batch
            with record_routing(self.model) as records:
                _, _, log = self.task.valid_step(sample, self.model, self.criterion)
            sums.update({key: float(value) for key, value in log.items() if not isinstance(value, list)})
            for counter, (layer, routing) in zip(counters, records, strict=bool(counters)):
                counter.count(layer.router.candidates(routing.probs_TE)[0])
        self.progress.remove_task(self.progress.task_ids[-1])
        total = {
            name: sum(sums[f"moe_{side}_{name}"] for side in ("encoder", "decoder"))
            for name in ("rows_kept", "tokens", "flops", "flops_dense_ffn")
        }
        return Point(
            thresholds,
            loss=sums["nll_loss" if "nll_loss" in sums else "loss"] / sums["ntokens"] / math.log(2),
            experts=total["rows_kept"] / total["tokens"],
            flops=total["flops"] / total["flops_dense_ffn"],
            wanted=wanted_by(counters),
        )


def wanted_by(counters: list[Budget]) -> tuple[float, ...]:
    if not counters:
        return ()
    counts_LB = torch.stack([counter.pop_counts() for counter in counters])
    target_L = torch.tensor([counter.target for counter in counters], dtype=torch.float64)
    return tuple(round(t, 6) for t in threshold_for(counts_LB, target_L).tolist())
