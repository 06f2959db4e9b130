"""Numbers that overflow: one line that says where."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from commands import TINY_MT, TRAIN, run
from distributed import run_ranks
from fairseq.tasks import FairseqTask
from parallel_runs import MT, fairseq_train

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


def test_numbers_that_overflow_end_a_command_with_one_line(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """In the forward or the backward pass, as it happens."""
    flags = (*TINY_MT, *TRAIN, "--save-dir", tmp_path, "--lr", 9e5, "--clip-norm", 0, "--max-update", 40)
    output = run("fairseq-train", corpus[0], *flags, succeeds=False)
    last = output.strip().splitlines()[-1]
    assert re.match(r"fairseq-train: error: (\w+\.layers\.1: router \w+ .*|gradients of .*) NaN", last), last
    assert "Traceback" not in output
