"""What fairseq's learning-rate schedules need."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, get_args

from xmoe_fairseq_compat.errors import FlagError, flag
from xmoe_fairseq_compat.registry import patch, wrap


@patch("fairseq.dataclass.utils")
def follow_the_setting_that_is_a_default(module: Any) -> None:
    """Every torch: on a command line a number whose default is another setting begins as None and is refused.
    So --lr-scheduler polynomial_decay never takes --max-update for its --total-num-update."""

    def is_unset(field: Any, args: Namespace) -> bool:
        follows = isinstance(field.default, str) and field.default.startswith("${")
        may_be_none = type(None) in get_args(field.type)
        return follows and not may_be_none and getattr(args, field.name, "") is None

    @wrap(module, "_override_attr")
    def _override_attr(plain: Any, sub_node: str, data_class: Any, args: Any) -> Any:
        fields = getattr(data_class, "__dataclass_fields__", {}).values()
        if unset := {field.name for field in fields if is_unset(field, args)}:
            args = Namespace(**{name: value for name, value in vars(args).items() if name not in unset})
        return plain(sub_node, data_class, args)


# Of each --lr-scheduler: what holds, as a user would say it, and the settings to show.
SCHEDULES: dict[str, tuple[tuple[str, str, Callable[[Any], bool]], ...]] = {
    "polynomial_decay": (
        ("--total-num-update or --max-update above 0", "total_num_update", lambda c: c.total_num_update > 0),
    ),
    "cosine": (
        (
            "--max-update or --lr-period-updates above 0",
            "max_update lr_period_updates",
            lambda c: c.lr_period_updates > 0 or c.max_update > 0,
        ),
        (
            "--warmup-updates other than --max-update",
            "warmup_updates",
            lambda c: c.lr_period_updates > 0 or c.max_update != c.warmup_updates,
        ),
    ),
    "tri_stage": (
        (
            "--max-update above 0 with --phase-ratio",
            "max_update phase_ratio",
            lambda c: c.phase_ratio is None or c.max_update > 0,
        ),
        (
            "--decay-steps above 0, or --phase-ratio and --max-update that give some",
            "decay_steps phase_ratio max_update",
            lambda c: (c.decay_steps if c.phase_ratio is None else int(c.max_update * c.phase_ratio[2])) > 0,
        ),
        ("--final-lr-scale above 0", "final_lr_scale", lambda c: c.final_lr_scale > 0),
    ),
    "triangular": (
        ("--max-lr above --lr", "max_lr lr", lambda c: c.max_lr > c.lr[0]),
        ("--lr-period-updates of 2 or more", "lr_period_updates", lambda c: c.lr_period_updates >= 2),
    ),
    "step": (
        ("--lr-deacy-period above 0", "lr_deacy_period", lambda c: c.lr_deacy_period > 0),
    ),
}  # fmt: skip


@patch("fairseq.optim.lr_scheduler")
def say_what_a_schedule_needs(module: Any) -> None:
    """Every torch: a schedule without what it needs ends in an assertion, most of them without a word, or
    divides by zero."""

    @wrap(module, "build_lr_scheduler")
    def build_lr_scheduler(plain: Any, cfg: Any, optimizer: Any) -> Any:
        schedule = str(getattr(cfg, "_name", None) or getattr(cfg, "lr_scheduler", None))
        for need, settings, holds in SCHEDULES.get(schedule, ()):
            if not holds(cfg):
                got = ", ".join(f"{flag(name)} {getattr(cfg, name)}" for name in settings.split())
                raise FlagError(f"--lr-scheduler {schedule} needs {need}, got {got}")
        try:
            return plain(cfg, optimizer)
        except (AssertionError, ValueError) as error:
            raise FlagError(f"--lr-scheduler {schedule}: {error}") from error
