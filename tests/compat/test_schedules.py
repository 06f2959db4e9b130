"""What learning-rate schedules need, and where their defaults come from."""

from typing import Any

import pytest
import torch
from fairseq import optim, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import lr_scheduler
from omegaconf import DictConfig


def configuration(*flags: Any) -> DictConfig:
    common = ("data", "--batch-size", "1", "--arch", "transformer_tiny", "--optimizer", "sgd", "--lr", "0.1")
    parsed = options.parse_args_and_arch(options.get_training_parser(), [*common, *map(str, flags)])
    return convert_namespace_to_omegaconf(parsed)


def schedule(*flags: Any) -> Any:
    cfg = configuration("--lr-scheduler", *flags)
    optimizer = optim.build_optimizer(cfg.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    return lr_scheduler.build_lr_scheduler(cfg.lr_scheduler, optimizer)


@pytest.mark.parametrize(
    "flags, line",
    [
        (("polynomial_decay",), "--total-num-update or --max-update above 0, got --total-num-update 0.0"),
        (
            ("cosine",),
            "--max-update or --lr-period-updates above 0, got --max-update 0, --lr-period-updates -1.0",
        ),
        (
            ("cosine", "--max-update", 9, "--warmup-updates", 9),
            "--warmup-updates other than --max-update, got --warmup-updates 9",
        ),
        (
            ("tri_stage",),
            "--decay-steps above 0, or --phase-ratio .*, got --decay-steps 0, --phase-ratio None",
        ),
        (("tri_stage", "--warmup-steps", 3), "--decay-steps above 0, or"),
        (
            ("tri_stage", "--phase-ratio", "(.1,.4,.5)"),
            "--max-update above 0 with --phase-ratio, got --max-update 0",
        ),
        (("tri_stage", "--decay-steps", 3, "--final-lr-scale", 0), "--final-lr-scale above 0, got"),
        (("triangular", "--max-lr", 0.05), "--max-lr above --lr, got --max-lr 0.05"),
        (("triangular", "--max-lr", 1, "--lr-period-updates", 1), "--lr-period-updates of 2 or more, got"),
        (("step", "--lr-deacy-period", 0), "--lr-deacy-period above 0, got --lr-deacy-period 0"),
    ],
)
def test_what_a_schedule_needs(flags: tuple, line: str) -> None:
    with pytest.raises(ValueError, match=f"^--lr-scheduler {flags[0]} needs {line}"):
        schedule(*flags)


def test_what_a_schedule_itself_refuses_names_the_flag() -> None:
    with pytest.raises(ValueError, match="^--lr-scheduler tri_stage: phase ratios must add up to 1"):
        schedule("tri_stage", "--phase-ratio", "(.1,.1,.1)", "--max-update", 90)


@pytest.mark.parametrize(
    "flags, end", [(("--max-update", 8), 8), (("--max-update", 8, "--total-num-update", 4), 4)]
)
def test_a_default_that_is_another_setting_is_followed(flags: tuple, end: int) -> None:
    decay = schedule("polynomial_decay", *flags)
    assert decay.total_num_update == end
    decay.step_begin_epoch(1)
    assert decay.step_update(end // 2) == pytest.approx(0.05) and decay.step_update(end) == 0


@pytest.mark.parametrize(
    "flags",
    [
        ("cosine", "--lr-period-updates", 5),
        ("cosine", "--max-update", 5, "--warmup-updates", 7),
        ("inverse_sqrt",),
        ("tri_stage", "--decay-steps", 3),
        ("tri_stage", "--phase-ratio", "(.1,.4,.5)", "--max-update", 9),
        ("triangular", "--max-lr", 1),
        ("step",),
        ("fixed",),
        ("reduce_lr_on_plateau",),
    ],
)
def test_what_suffices(flags: tuple) -> None:
    assert schedule(*flags).step_update(1) >= 0
