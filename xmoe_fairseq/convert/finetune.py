"""A short fine-tuning of a converted model, while it computes as little as it will later."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.moe import Router, check_finite, moe_layers

TUNED = ("router", "all")  # the router alone, or experts and output biases too
PARTS = 4  # a choice; the thresholds are chosen anew for each: a router that learns changes what they cost


def finetune(model: nn.Module, task: Any, criterion: Any, args: Namespace, choose: Callable[[], Any]) -> None:
    """Adam on the MoE layers alone, with the dense model's own criterion; attention and embeddings stay.

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
            loss, sample_size, _ = criterion(model, sample)
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
        modules = layer.modules() if tuned == "all" else [m for m in layer.modules() if isinstance(m, Router)]
        for module in modules:
            yield from module.parameters(recurse=False)
