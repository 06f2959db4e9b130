"""--moe-router-args: what a router of a user's own is built with."""

import inspect
import json
from types import UnionType
from typing import Any, Union, get_args, get_origin

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
    takes = parameters_of(kind)
    if text and not takes:
        flags = ", ".join(flag(f.name) for f in kind.flags)
        raise FlagError(
            f"{NAME} must be empty with --moe-router {router}, which takes {flags or 'none'}, got {text}"
        )
    given = _read(text) if text else {}
    for name, value in given.items():
        if name not in takes:
            listed = ", ".join(f"{each} ({_said(takes[each].annotation)})" for each in takes)
            hint = did_you_mean(name, takes)
            raise FlagError(f"{NAME} must name what --moe-router {router} takes, {listed}, got {name}{hint}")
        if not _fits(value, takes[name].annotation):
            kinds = _said(takes[name].annotation)
            raise FlagError(f"{NAME}: {name} must be of type {kinds}, got {json.dumps(value)}")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in given:
            raise FlagError(
                f"{NAME} must give {name}, which --moe-router {router} needs, got {text or 'none'}"
            )
    return given


def parameters_of(kind: type[RouterKind]) -> dict[str, inspect.Parameter]:
    """What `from_config` takes by name; if it takes anything, what the constructor takes beside what it is
    given anyway."""
    _, *own = _signature(kind.from_config)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
        given = OF_LAYER if issubclass(kind, RoutedLayer) else OF_ROUTER
        own = [parameter for parameter in _signature(kind) if parameter.name not in given]
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter for parameter in own if parameter.kind in by_name}


def _signature(function: Any) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # of an import for type checkers only
        signature = inspect.signature(function)
    return list(signature.parameters.values())


def _read(text: Any) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        hydra = (
            ""
            if isinstance(text, str)
            else "; for hydra, quote it once more: \"+model.moe_router_args='{...}'\""
        )
        raise FlagError(f"{NAME} must be a JSON object, such as '{{\"factor\": 2.0}}', got {text}{hydra}")
    return given


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _fits(value: Any, annotation: Any) -> bool:
    return any(_is(value, get_origin(kind) or kind) for kind in _kinds(annotation))


def _is(value: Any, kind: Any) -> bool:
    if not isinstance(kind, type) or kind is inspect.Parameter.empty:
        return True  # its own rules say
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)


def _said(annotation: Any) -> str:
    names = [getattr(kind, "__name__", str(kind)) for kind in _kinds(annotation)]
    return "any value" if annotation is inspect.Parameter.empty else " or ".join(names)
