"""Numbers that overflow: one line that says where."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from commands import TINY_MT, TRAIN, run
from distributed import run_ranks
from fairseq.tasks import FairseqTask
from parallel_runs import MT, fairseq_train

from xmoe_fairseq.moe import finite

DENSE = (
    "--task", "translation", "--arch", "transformer_tiny", "--batch-size", "8", "--criterion",
    "label_smoothed_cross_entropy",
)  # fmt: skip


SPREAD = (*MT, "--moe-expert-parallel-size", "2")


@pytest.mark.parametrize(
    "ranks, model, name",
    [
        (1, MT, "encoder.layers.1.moe.router.weight"),
        (1, DENSE, "encoder.layers.1.fc1.weight"),
        (2, SPREAD, "encoder.layers.1.moe.experts.fc1_weight"),
    ],
    ids=["MoE", "dense", "spread experts"],
)
def test_a_gradient_that_is_not_finite_names_its_parameter(
    ranks: int, model: tuple[str, ...], name: str, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    plain_step = FairseqTask.train_step

    def step(self: Any, sample: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        handle = model.get_parameter(name).register_hook(lambda grad: grad * float("inf"))
        try:
            return plain_step(self, sample, model, *args, **kwargs)
        finally:
            handle.remove()

    def last_words() -> str:
        with patch.object(FairseqTask, "train_step", step), pytest.raises(FloatingPointError) as error:
            fairseq_train(corpus[0], *model, *TRAIN, "--save-dir", tmp_path, "--max-update", 2)
        return str(error.value)

    for said in run_ranks(ranks, last_words):
        assert re.match(
            rf"gradients of 1 of \d+ parameters are NaN, inf or .*, the first {name}; lower --lr", said
        )


RELU = (*MT, "--moe-router", "relu")


@pytest.mark.parametrize(
    "ranks, flags, during",
    [(1, MT, "valid_step"), (1, MT, "train_step"), (1, RELU, "train_step"), (2, RELU, "train_step")],
    ids=["validation", "threshold", "relu", "relu on 2 ranks"],
)
def test_what_a_gpus_host_learns_late_ends_before_it_is_used(
    ranks: int, flags: tuple[str, ...], during: str, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    """A score is NaN on one rank, in the second update or the first validation. Of a ReLU router, which
    passes over it, no gradient tells."""
    plain_step, updates = getattr(FairseqTask, during), []

    def step(self: Any, sample: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if updates and (not dist.is_initialized() or dist.get_rank() == 0):
            # Of 3e38 scores are inf, and no gradient tells. But on a CPU ranks do not compare their norms, as
            # they do on GPUs: there it is NaN, which is in the gradients, too.
            weight = 3e38 if flags is RELU and ranks == 1 else torch.nan
            model.get_parameter("encoder.layers.1.moe.router.weight").data[3] = weight
        return plain_step(self, sample, model, *args, **kwargs)

    def optimizer_step(*_: Any, **__: Any) -> None:
        updates.append(1)

    def last_words() -> tuple[str, int]:
        with (
            patch.object(finite, "can_read", lambda tensor: False),
            patch.object(FairseqTask, during, step),
            patch.object(FairseqTask, "optimizer_step", optimizer_step),
            pytest.raises(FloatingPointError) as error,
        ):
            fairseq_train(corpus[0], *flags, *TRAIN, "--save-dir", tmp_path, "--max-update", 2)
        return str(error.value), len(updates)

    said, *of_others = run_ranks(ranks, last_words)
    updates_done = 1 if during == "train_step" else 2
    assert said == ("encoder.layers.1: router input or scores are NaN or inf", updates_done)
    assert all(updates == updates_done for _, updates in of_others)


def test_numbers_that_overflow_end_a_command_with_one_line(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """In the forward or the backward pass, as it happens."""
    flags = (*TINY_MT, *TRAIN, "--save-dir", tmp_path, "--lr", 9e5, "--clip-norm", 0, "--max-update", 40)
    output = run("fairseq-train", corpus[0], *flags, succeeds=False)
    last = output.strip().splitlines()[-1]
    assert re.match(r"fairseq-train: error: (\w+\.layers\.1: router \w+ .*|gradients of .*) NaN", last), last
    assert "Traceback" not in output
