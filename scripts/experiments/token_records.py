"""What each token of a text is, what is lost by it, and how many experts it takes. See token_kinds.py."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data.data_utils import load_indexed_dataset
from fairseq.utils import apply_to_sample
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from experiments.results import read_run
from xmoe_fairseq.batches import Batches
from xmoe_fairseq.explain.collect import read_by, title_of
from xmoe_fairseq.moe import moe_layers, record_routing
from xmoe_fairseq.thresholds.checkpoint import MAX_TOKENS, open_model
from xmoe_fairseq_compat.errors import UserError

Array = NDArray[Any]


@dataclass(frozen=True)
class Tokens:
    """N tokens that one side reads, L MoE layers."""

    pieces: list[str]  # by id
    layers: list[str]
    id_N: Array
    frequency_N: Array  # how often the piece is in the training text
    position_N: Array  # from 0, in the block or sentence
    own_N: Array  # bits of predicting the piece; NaN: nothing does
    next_N: Array  # bits of predicting the one that follows
    experts_NL: Array  # that compute it, shared ones too


def records_of(runs: Sequence[Path], split: str, tokens: int) -> dict[str, Tokens]:
    """By side, of all runs together: those of one model.

    Raises:
        UserError: it has no MoE layers.
    """
    found: dict[str, list[Tokens]] = defaultdict(list)
    for run in runs:
        model, task, cfg = open_model(run / "checkpoint_best.pt", Path(read_run(run)["data"]))
        if not moe_layers(model):
            raise UserError(f"RUN must be of a model with MoE layers, got {run}")
        max_tokens = cfg.dataset.max_tokens_valid or MAX_TOKENS
        batches = Batches(task, split, tokens, max_tokens, seed=1)
        for side, each in collect(model, task, batches, partial(frequencies, cfg.task)).items():
            found[side].append(each)
    return {side: together(each) for side, each in found.items()}


def together(each: Sequence[Tokens]) -> Tokens:
    names = [field.name for field in fields(Tokens)][2:]
    arrays = {name: np.concatenate([getattr(one, name) for one in each]) for name in names}
    return Tokens(each[0].pieces, each[0].layers, **arrays)


@torch.no_grad()
def collect(
    model: nn.Module, task: Any, batches: Batches, frequencies_of: Callable[[str, int], Array]
) -> dict[str, Tokens]:
    """
    Args:
        frequencies_of: a side, by the ids of its dictionary of this size.
    """
    dictionaries = {"encoder": task.source_dictionary, "decoder": task.target_dictionary}
    columns: dict[str, dict[str, list[Array]]] = defaultdict(lambda: defaultdict(list))
    layers: dict[str, list[str]] = {}
    device = next(model.parameters()).device
    for batch in batches:
        sample = apply_to_sample(lambda tensor: tensor.to(device), batch)
        with record_routing(model) as records:
            output = model(**sample["net_input"])
        for side, ids_BL in read_by(sample).items():
            own = [(layer, routing) for layer, routing in records if layer.side == side]
            if own:
                layers[side] = [title_of(layer.name) for layer, _ in own]
                pad = dictionaries[side].pad()
                loss_BL = losses(model, output, sample["target"], pad) if side == "decoder" else None
                for name, column in {**places(ids_BL, pad, loss_BL), "experts_NL": experts(own)}.items():
                    columns[side][name].append(column)
    found = {}
    for side, each in columns.items():
        arrays = {name: np.concatenate(parts) for name, parts in each.items()}
        frequency_V = frequencies_of(side, len(dictionaries[side]))
        pieces = dictionaries[side].symbols
        found[side] = Tokens(pieces, layers[side], frequency_N=frequency_V[arrays["id_N"]], **arrays)
    return found


def losses(model: Any, output: Any, target_BL: Tensor, pad: int) -> Tensor:
    """(B, L) bits of predicting what follows; NaN where it is padding."""
    log_probs_BLV = model.get_normalized_probs(output, log_probs=True).float()
    bits_BL = nll_loss(log_probs_BLV.transpose(1, 2), target_BL, reduction="none") / math.log(2)
    return bits_BL.masked_fill(target_BL.eq(pad), math.nan)


def places(ids_BL: Tensor, pad: int, loss_BL: Tensor | None) -> dict[str, Array]:
    """Without padding, in the order in which MoE layers get tokens: (length, batch)."""
    there_BL = ids_BL.ne(pad)
    next_BL = torch.full(ids_BL.shape, math.nan) if loss_BL is None else loss_BL
    own_BL = torch.cat([torch.full_like(next_BL[:, :1], math.nan), next_BL[:, :-1]], dim=1)
    columns = {"id_N": ids_BL, "position_N": there_BL.cumsum(1) - 1, "own_N": own_BL, "next_N": next_BL}
    kept = there_BL.t().cpu()
    return {name: column.t().cpu()[kept].numpy() for name, column in columns.items()}


def experts(records: Sequence[Any]) -> Array:
    """(N, L)"""
    columns = [
        torch.bincount(routing.token_R, minlength=routing.num_tokens) + routing.shared_experts
        for _, routing in records
    ]
    return np.asarray(torch.stack(columns, dim=1).cpu().numpy(), dtype=float)


def frequencies(settings: Any, side: str, size: int) -> Array:
    """(V,) in the training text: a dictionary may say 1 of every piece.

    Args:
        settings: of the task.
    """
    source, target = (getattr(settings, name, None) for name in ("source_lang", "target_lang"))
    name = f"train.{source}-{target}.{source if side == 'encoder' else target}" if source else "train"
    counts_V = np.zeros(size)
    for folder in str(settings.data).split(":"):
        text = load_indexed_dataset(str(Path(folder) / name), combine=True)
        if text is None:
            raise UserError(f"{folder}: holds no {name}, to count pieces in")
        for i in range(len(text)):
            counts_V += np.bincount(text[i], minlength=size)
    return counts_V
