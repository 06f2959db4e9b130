"""A short fine-tuning of a converted model, while it computes as little as it will later."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import nn

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.moe import Router, moe_layers

TUNED = ("router", "all")
PARTS = 4  # a choice; the thresholds are chosen anew for each: a router that learns changes what they cost


def finetune(
    model: nn.Module, criterion: Any, make_batches: Callable[[int], Batches], updates: int, tuned: str,
    lr: float, choose: Callable[[], Any], progress: Any,
) -> None:  # fmt: skip
    """Adam on the MoE layers alone, with the dense model's own criterion; attention and embeddings stay.

    Args:
        make_batches: of an epoch.
        tuned: "router", or "all": experts and output biases too.
        lr: falls to 0 over the updates.
        choose: sets the thresholds.
        progress: tqdm; moves on by the updates.
    """
    parameters = list(tunable(model, tuned))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.98))  # the paper's for translation
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(updates, 1))
    samples = (sample for epoch in count() for sample in make_batches(epoch))
    done = 0
    for part in range(PARTS):
        choose()
        model.train()
        upto = updates * (part + 1) // PARTS
        for sample in islice(samples, upto - done):
            loss, sample_size, _ = criterion(model, sample)
            optimizer.zero_grad()
            (loss / max(sample_size, 1)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{float(loss.detach()) / max(sample_size, 1):.3f}")
            progress.update()
        done = upto
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()


def tunable(model: nn.Module, tuned: str) -> Iterator[nn.Parameter]:
    for layer in moe_layers(model):
        modules = layer.modules() if tuned == "all" else [m for m in layer.modules() if isinstance(m, Router)]
        for module in modules:
            yield from module.parameters(recurse=False)
