"""--moe-router-args: what a router of a user's own is built with."""

import json
from inspect import Parameter, signature
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from xmoe_fairseq.moe.routed_layer import RoutedLayer
from xmoe_fairseq.moe.routers.registry import RouterKind
from xmoe_fairseq_compat.errors import FlagError, flag
from xmoe_fairseq_compat.override_rules import did_you_mean

NAME = "--moe-router-args"
OF_ROUTER = {"model_dim", "num_experts"}
OF_LAYER = OF_ROUTER | {"expert_dim", "activation", "activation_dropout", "dense_ffn_dim", "name", "side"}


def read_router_args(router: str, kind: type[RouterKind], text: Any) -> dict[str, Any]:
    """What `kind.from_config` is to be called with, beside the place.

    Raises:
        FlagError: no JSON object of what this router takes.
    """

    def refuse(rule: str, got: Any) -> NoReturn:
        raise FlagError(f"{NAME}{rule}, got {got}")

    takes, here = parameters_of(kind), f"--moe-router {router}"
    if text and not takes:
        flags = ", ".join(flag(f.name) for f in kind.flags)
        refuse(f" must be empty with {here}, which takes {flags or 'none'}", text)
    given = _read(text) if text else {}
    for name, value in given.items():
        if name not in takes:
            listed = ", ".join(f"{each} ({_said(parameter)})" for each, parameter in takes.items())
            refuse(f" must name what {here} takes, {listed}", f"{name}{did_you_mean(name, takes)}")
        if not _fits(value, takes[name]):
            refuse(f": {name} must be of type {_said(takes[name])}", json.dumps(value))
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in given:
            refuse(f" must give {name}, which {here} needs", text or "none")
    return given


def parameters_of(kind: type[RouterKind]) -> dict[str, Parameter]:
    """What `from_config` takes by name; if it takes anything, what the constructor takes beside what it is
    given anyway."""
    _, *own = _signature(kind.from_config)
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in own):
        given = OF_LAYER if issubclass(kind, RoutedLayer) else OF_ROUTER
        own = [parameter for parameter in _signature(kind) if parameter.name not in given]
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter for parameter in own if parameter.kind in by_name}


def _signature(function: Any) -> list[Parameter]:
    try:
        return list(signature(function, eval_str=True).parameters.values())
    except Exception:  # an annotation that cannot be evaluated, as of an import for type checkers only
        return list(signature(function).parameters.values())


def _read(text: Any) -> dict[str, Any]:
    try:
        given = json.loads(text, parse_constant=_no_number, object_pairs_hook=_each_once)
    except (TypeError, ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        hydra = "; for hydra, quote it once more: \"+model.moe_router_args='{...}'\""
        but = "" if isinstance(text, str) else hydra
        rule = "must be a JSON object, each name once, such as '{\"factor\": 2.0}'"
        raise FlagError(f"{NAME} {rule}, got {text}{but}")
    return given


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # NaN, which passes most rules, and Infinity


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(given := dict(pairs)) < len(pairs):
        raise ValueError("a name twice, of which one value would be passed over")
    return given


def _kinds(parameter: Parameter) -> tuple[Any, ...]:
    kind = parameter.annotation
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _fits(value: Any, parameter: Parameter) -> bool:
    return any(_is(value, get_origin(kind) or kind) for kind in _kinds(parameter))


def _is(value: Any, kind: Any) -> bool:
    if not isinstance(kind, type) or kind in (Any, object, Parameter.empty):
        return True  # its own rules say
    if isinstance(value, bool):
        return kind is bool
    kinds: Any = {float: (int, float), tuple: list}.get(kind, kind)  # JSON has no tuples
    try:
        return isinstance(value, kinds)
    except TypeError:  # of a Protocol or a TypedDict
        return True


def _said(parameter: Parameter) -> str:
    names = [getattr(kind, "__name__", str(kind)) for kind in _kinds(parameter)]
    return "any value" if parameter.annotation is Parameter.empty else " or ".join(names)
