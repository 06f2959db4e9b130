"""A short fine-tuning of a converted model, while it computes as little as it will later."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.convert.models import Dense
from xmoe_fairseq.criterions.moe_loss import MoELossMixin
from xmoe_fairseq.moe import Router, check_finite, moe_layers

LOSSES = ("task", "distill")
TUNED = ("router", "all")  # the router alone, or experts and output biases too
PARTS = 4  # a choice; the thresholds are chosen anew for each: a router that learns changes what they cost


Loss = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, int]]  # of a batch: a sum, and over how many


def task_loss(dense: Dense) -> Loss:
    """The dense model's own criterion, without what moe_ criterions add: balanced routers would rank experts
    by something else than what they contribute."""
    criterion: Any = dense.task.build_criterion(dense.state["cfg"].criterion)
    if isinstance(criterion, MoELossMixin):
        criterion.weigh(0.0)
    return lambda model, sample: criterion(model, sample)[:2]


def distillation(dense: Dense) -> Loss:
    """Divergence of the sparse model's probabilities from the dense one's, `sum_v q(v) ln(q(v) / p(v))`, over
    the target tokens (Hinton et al. 2015, arXiv 1503.02531, at temperature 1)."""
    pad = dense.task.target_dictionary.pad()

    def log_probs(model: Any, sample: dict[str, Any]) -> Tensor:
        every: Tensor = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
        return every[sample["target"].ne(pad)]

    def loss(model: nn.Module, sample: dict[str, Any]) -> tuple[Tensor, int]:
        with torch.no_grad():
            wanted_TV = log_probs(dense.model, sample)
        found_TV = log_probs(model, sample)
        return F.kl_div(found_TV, wanted_TV, reduction="sum", log_target=True), len(found_TV)

    return loss


def finetune(model: nn.Module, task: Any, loss_of: Loss, args: Namespace, choose: Callable[[], Any]) -> None:
    """Adam on the MoE layers alone; attention and embeddings stay.

    Args:
        args: of xmoe-convert; --finetune-lr falls to 0 over the updates.
        choose: sets the thresholds.
    """
    updates = args.finetune_updates
    parameters = list(tunable(model, args.finetune))
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    betas = (0.9, 0.98)  # the paper's for translation
    optimizer = torch.optim.Adam(parameters, lr=args.finetune_lr, betas=betas)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    epochs = (Batches(task, "train", 2**62, args.max_tokens, args.seed + epoch) for epoch in count(1))
    samples = (sample for epoch in epochs for sample in epoch)
    progress = tqdm(desc="fine-tune", total=updates, unit="update")
    for part in range(PARTS):
        choose()
        model.train()
        for sample in islice(samples, updates * (part + 1) // PARTS - updates * part // PARTS):
            loss, sample_size = loss_of(model, sample)
            optimizer.zero_grad()
            (loss / max(sample_size, 1)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            check_finite(model)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{float(loss.detach()) / max(sample_size, 1):.3f}")
            progress.update()
    progress.close()
    model.requires_grad_(True).eval()


def tunable(model: nn.Module, tuned: str) -> Iterator[nn.Parameter]:
    for layer in moe_layers(model):
        routers = (module for module in layer.modules() if isinstance(module, Router))
        for module in [layer] if tuned == "all" else routers:
            yield from module.parameters()
