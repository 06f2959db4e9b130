"""A checkpoint's configuration cannot ask for a model far larger than the checkpoint."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from hostile import checkpoint
from torch import nn

from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.sizes import Limit, within


@pytest.mark.parametrize(
    "settings",
    [
        {"decoder_layers": 10**6},
        {"decoder_embed_dim": 2**20, "decoder_input_dim": 2**20, "decoder_output_dim": 2**20},
        {"decoder_layers": 10**6, "max_target_positions": 10**11},
    ],
)
def test_a_model_far_larger_than_its_checkpoint_is_refused(settings: dict[str, int], tmp_path: Path) -> None:
    """build_within_what_a_checkpoint_holds"""
    path = checkpoint(tmp_path, lambda state: state["cfg"]["model"].update(settings))
    with pytest.raises(CheckpointError) as error:
        checkpoint_utils.load_model_ensemble_and_task([str(path)])
    assert re.fullmatch(
        f"cannot load checkpoint {path}: its configuration, or what overrides it, asks for more than"
        r" [\d,]+ values in [\d,]+ parameters, and it holds [\d,]+ in [\d,]+; do not use it",
        str(error.value),
    )
    nn.Linear(2, 2)  # outside nothing is counted any more


def test_parameters_that_are_too_many_values_together_are_refused() -> None:
    """None of them, nor their number, is more than a small checkpoint allows."""
    limit = Limit("x.pt", {"model": {"weight": torch.ones(4)}})
    parameter = nn.Parameter(torch.empty(2**22, device="meta"))
    with pytest.raises(CheckpointError, match="asks for more than 272,629,760 values in 65 parameters"):
        for _ in range(1000):
            limit.count(None, "weight", parameter)


def test_a_checkpoint_that_was_read_before_counts_too(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda state: state["cfg"]["model"].update(decoder_layers=10**6))
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    with pytest.raises(CheckpointError, match="asks for more than"):
        checkpoint_utils.load_model_ensemble([str(path)], state=state)


def test_each_of_several_checkpoints_counts_for_itself(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths = [str(checkpoint(tmp_path / name)) for name in ("one", "two")]
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(paths)
    assert len(models) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(10**6, 10**6),
        lambda: torch.empty(10**12),
        lambda: torch.arange(0, 10**12),
        lambda: torch.Tensor(10**6, 10**6),
        lambda: torch.ones(1).new_full((10**12,), 1.0),
        lambda: torch.ones(10**6, 1) * torch.ones(1, 10**6),
        lambda: torch.randperm(10**12),
    ],
)
def test_nothing_large_is_allocated(make: Any) -> None:
    with pytest.raises(CheckpointError, match="1,000,000,000,000 values"), within("file", {"model": {}}):
        make()
