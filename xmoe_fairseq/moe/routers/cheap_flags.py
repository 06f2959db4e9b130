"""The flags of cheap experts (moe/cheap.py), for the routers that choose among them."""

from typing import Any

from xmoe_fairseq.moe.routers.registry import Flag

KINDS = {
    "zero": "that give 0 (MoE++; AdaMoE's null experts)",
    "copy": "that give the token itself (MoE++)",
    "constant": "that mix the token with a learned vector (MoE++)",
}


def num_cheap(config: Any) -> int:
    """Z, of the flags."""
    return sum(getattr(config, f"moe_{kind}_experts") for kind in KINDS)


def balance_is_possible(config: Any) -> bool:
    has_loss = num_cheap(config) > 0 and config.moe_balance not in ("bias", "none")
    return config.moe_cheap_balance == 1 or (has_loss and 0 < config.moe_cheap_balance < float("inf"))


CHEAP = (
    *(
        Flag(
            f"moe_{kind}_experts", 0, f"so many more to choose from, {what}; no FLOPs, and not among the E",
            rule="must be 0 (none) or more", refused_elsewhere=True,
            holds=lambda config, name=f"moe_{kind}_experts": getattr(config, name) >= 0,  # type: ignore[misc]
        )
        for kind, what in KINDS.items()
    ),
    Flag(
        "moe_cheap_balance", 1.0, "times that a zero, copy or constant expert counts in the load-balance "
        "loss (MoE++'s tau); below 1 they get more tokens each than the others",
        rule="must be above 0, and 1 without such experts or without a loss (--moe-balance bias, none)",
        holds=balance_is_possible, refused_elsewhere=True,
    ),
)  # fmt: skip
