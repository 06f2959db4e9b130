"""Routers by name: a class says all that the rest must know about it.

Flags and their rules, --help, docs/flags.md and warnings are drawn from here, so a new router is one
file: in this folder, or in a user's own --user-dir.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn

DEFAULT = "threshold"  # the paper's, listed first


@dataclass(frozen=True)
class Flag:
    """A --moe-* flag of one router or of several."""

    name: str  # such as moe_topk
    default: Any
    help: str  # the names of the routers that take it are put before
    rule: str = ""  # "must be ...": what is said of a configuration where it does not hold
    holds: Callable[[Any], bool] = lambda config: True
    refused_elsewhere: bool = False  # with a router that does not take it; else it is passed over
    idle: tuple[Any, ...] = ()  # values, beside the default, that ask for nothing and are not refused there
    unless: tuple[str, ...] = ()  # other flags which, when given, stand in its place


@dataclass(frozen=True)
class Place:
    """What a router is built for."""

    model_dim: int
    num_experts: int
    config: Any  # the model's --moe-* flags, see xmoe_fairseq/flags.py
    dictionary: Any = None  # of the tokens that this side reads: len() ids, `count` of each in the text
    layer: int = 0  # number of the MoE layer in the model; the encoder's come first


class RouterKind:
    """What a registered class declares; by default that each token is routed by itself."""

    description: ClassVar[str] = ""  # a token's experts, for --help and docs/flags.md
    depends_on_batch: ClassVar[str] = "no"  # or "in training", "yes"
    is_causal: ClassVar[bool] = True  # else it is refused in decoders: a token would depend on later ones
    needs_balance_loss: ClassVar[bool] = True  # else training without it gives no warning
    weighs_own_loss: ClassVar[bool] = False  # no --moe-loss-coeff, and no training without its loss
    has_own_capacity: ClassVar[bool] = False  # else it takes capacity factors
    takes_ones: ClassVar[bool] = False  # --moe-combine ones: its weights are probabilities
    takes_normalized: ClassVar[bool] = False  # --moe-combine normalized: a token may have several experts
    goes_by_ids: ClassVar[bool] = False  # needs `ids_T`
    goes_by_sentence: ClassVar[bool] = False  # needs the number of each token's sentence as `ids_T`
    flags: ClassVar[tuple[Flag, ...]] = ()

    num_cheap: int = 0  # of its experts, the last ones; the layer that has them says so, and
    cheap_balance: float = 1.0  # how many times they count in a load-balance loss
    counting: bool = True  # off while a batch runs that does not count in training: a rank's dummy batch

    @classmethod
    def settle(cls, config: Any) -> dict[str, Any]:
        """What stands for flags that leave a choice to the router: by name, to be built and to be saved."""
        return {}

    @classmethod
    def check(cls, config: Any, num_layers: int) -> None:
        """Rules between flags, settled ones, for a model with so many MoE layers.

        Raises:
            ValueError: one line that names the flag, the rule and the value.
        """

    @classmethod
    def planned_experts(cls, config: Any) -> tuple[str, float] | None:
        """Routed experts per token that the flags ask for, and before it how exactly: "", "about " or
        "at most ". None = they do not say."""
        return None

    @classmethod
    def from_config(cls, place: Place, *_: Any, **arguments: Any) -> Any:
        """A router as the flags describe it. What it takes by name, or if it takes any (as here) what the
        constructor takes, is what --moe-router-args may give."""
        return cls(model_dim=place.model_dim, num_experts=place.num_experts, **arguments)  # type: ignore

    @classmethod
    def after_update(cls, model: nn.Module) -> None:
        """State of the model's routers moves here: called on every rank after each update of a training."""


_ROUTERS: dict[str, type[RouterKind]] = {}
Registered = TypeVar("Registered", bound=type[RouterKind])


def register_router(name: str) -> Callable[[Registered], Registered]:
    """Class decorator: `--moe-router NAME` builds it.

    Raises:
        ValueError: the name is another class's; flags from outside this package, for which it is too late;
            or no `RouterKind`.
    """

    def register(kind: Registered) -> Registered:
        if not issubclass(kind, RouterKind):
            raise ValueError(f"router {name} must be a Router, TokenRouter or RouterKind, got {kind}")
        if not kind.__module__.startswith(__package__) and not set(kind.flags) <= flags_of_routers().keys():
            raise ValueError(f"router {name} must take its arguments by --moe-router-args, not by own flags")
        other = _ROUTERS.get(name, kind)
        if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            where = f"{other.__module__}.{other.__qualname__}"
            raise ValueError(f"router {name} is registered already, as {where}")
        _ROUTERS[name] = kind
        return kind

    return register


def registered_routers() -> dict[str, type[RouterKind]]:
    """By name."""
    return {name: _ROUTERS[name] for name in sorted(_ROUTERS, key=lambda name: (name != DEFAULT, name))}


def router_named(name: str) -> type[RouterKind]:
    """
    Raises:
        ValueError: nothing is registered by that name.
    """
    if name not in _ROUTERS:
        raise ValueError(
            f"--moe-router must be one of {', '.join(registered_routers())}, got {name}; a router of "
            "somebody's own needs the --user-dir that registers it"
        )
    return _ROUTERS[name]


def flags_of_routers() -> dict[Flag, list[str]]:
    """Each flag, and the routers that take it."""
    takers: dict[Flag, list[str]] = {}
    for name, kind in registered_routers().items():
        for flag in kind.flags:
            takers.setdefault(flag, []).append(name)
    return takers
