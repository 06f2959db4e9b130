"""Runs that are saved and go on in another layout of ranks."""

from pathlib import Path
from typing import Any

import torch
from parallel_runs import (
    EXACT,
    MT,
    Run,
    assert_same_training,
    train,
)

UPDATES = 2  # before the checkpoint, in the middle of an epoch


def train_to(update: int, ranks: int, size: int, folder: Path, *flags: object) -> list[Run]:
    """The same global batches whatever the number of ranks."""
    layout = ("--update-freq", 4 // ranks, "--moe-expert-parallel-size", size, "--ddp-backend", "legacy_ddp")
    saving = ("--save-interval-updates", UPDATES, "--save-dir", folder, "--disable-validation")
    return train(ranks, *flags, *layout, *saving, "--max-update", update)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_continues(
    checkpoint: Path, after: tuple[int, int], written: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    straight = written(1, 1, updates=4)[1][0]
    flags = (corpus[0], *MT, *EXACT, "--restore-file", checkpoint)
    runs = train_to(4, *after, tmp_path, *flags)
    expected = {
        **straight,
        "gradients": straight["gradients"][UPDATES:],
        "norms": straight["norms"][UPDATES:],
    }
    assert_same_training(runs, {**expected, "logs": straight["logs"][UPDATES:]}, after[1])
