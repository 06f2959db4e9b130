"""The flags of what keeps experts evenly used (moe/balance.py), for routers that leave it open."""

from typing import Any

from xmoe_fairseq.moe.balance import BALANCES, STEP
from xmoe_fairseq.moe.routers.registry import Flag


def step_is_possible(config: Any) -> bool:
    step: float = config.moe_balance_step
    return step == STEP or (config.moe_balance == "bias" and 0 < step < float("inf"))


BALANCE = (
    Flag(
        "moe_balance", "first", "what keeps experts evenly used: a loss by first choices (first), by all "
        "choices (all), by those in the last update's whole batch (global); no loss, but a bias on scores "
        "where tokens choose (bias); or none",
        rule=f"must be one of {', '.join(BALANCES)}", holds=lambda config: config.moe_balance in BALANCES,
        refused_elsewhere=True,
    ),
    Flag(
        "moe_balance_step", STEP, "u: by how much --moe-balance bias raises or lowers a score after "
        "each update; with the paper's 0.001 the first hundreds show little of it, 0.03 suits these",
        rule=f"must be above 0, and {STEP} without --moe-balance bias", holds=step_is_possible,
        refused_elsewhere=True,
    ),
)  # fmt: skip
