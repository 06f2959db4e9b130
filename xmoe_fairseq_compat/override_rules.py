"""Whether each of --model-overrides does what it says, by the configuration that a checkpoint holds."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.errors import FlagError, flag

# What of a checkpoint's configuration is used after loading; the rest comes from the command's own flags, and
# the last three in Python only.
GROUPS = ("model", "task", "generation", "tokenizer", "bpe")


def refuse(rule: str) -> None:
    raise FlagError(f"--model-overrides: {rule}")


def refuse_flag(name: str, meant: str) -> None:
    refuse(f"{name} is no setting of a model, but a flag: {flag(meant)}")


def all_settings(group: Any) -> dict[str, Any]:
    """Those of a part of a configuration, also of its parts."""
    from omegaconf import DictConfig, OmegaConf

    if isinstance(group, argparse.Namespace):
        return vars(group)
    if not isinstance(group, (DictConfig, dict)):
        return {}
    own = OmegaConf.to_container(group, resolve=False) if isinstance(group, DictConfig) else group
    assert isinstance(own, dict)
    inner = (all_settings(value) for value in own.values() if isinstance(value, dict))
    return {str(name): value for part in (*inner, own) for name, value in part.items()}


def flags_of(group: Any) -> dict[str, None]:
    """Those of a model or task of the older kind: a checkpoint has only those that were given or preset."""
    if not isinstance(group, argparse.Namespace):
        return {}
    from fairseq.models import ARCH_MODEL_REGISTRY
    from fairseq.tasks import TASK_REGISTRY

    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for name, registry in (("arch", ARCH_MODEL_REGISTRY), ("task", TASK_REGISTRY)):
        if getattr(group, name, None) in registry:
            registry[getattr(group, name)].add_args(parser)
    return dict.fromkeys(action.dest for action in parser._actions)


def component_settings(overrides: Mapping[str, Any]) -> set[str]:
    """Those of a tokenizer or the like that is chosen by its name."""
    from fairseq.registry import REGISTRIES

    chosen = (
        REGISTRIES[group]["dataclass_registry"].get(name)
        for group, name in overrides.items()
        if group in REGISTRIES and isinstance(name, str)
    )
    return {field.name for one in chosen if one for field in dataclasses.fields(one)}


def add_newer(overrides: Mapping[str, Any], cfg: Any) -> None:
    """Put in what the model has got since the checkpoint was written, at its default, where it is overridden:
    fairseq overrides what is there."""
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY
    from omegaconf import DictConfig, open_dict

    model = cfg.get("model")
    if not isinstance(model, DictConfig):
        return
    name, inner = model.get("_name"), overrides.get("model")
    dataclass = MODEL_DATACLASS_REGISTRY.get(ARCH_MODEL_NAME_REGISTRY.get(name, name))
    asked = {*overrides, *(inner if isinstance(inner, Mapping) else ())}
    with open_dict(model):
        for field in dataclasses.fields(dataclass) if dataclass else ():
            if field.name in asked and field.name not in model and field.default is not dataclasses.MISSING:
                model[field.name] = field.default


def check_overrides(overrides: Mapping[str, Any], cfg: Any, path: Any) -> None:
    """Raises FlagError where a setting would not do what it says.

    Args:
        overrides: what the user asked for.
        cfg: the checkpoint's configuration, before they are applied.
    """
    groups = {name: flags_of(cfg.get(name)) | all_settings(cfg.get(name)) for name in GROUPS}
    known = {name: value for group in reversed(groups.values()) for name, value in group.items()}
    chosen = component_settings(overrides)
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        whole = all_settings(cfg.get(name)) if name in cfg else {}
        if whole and isinstance(value, dict):
            for inner in value:
                check_known(inner, whole, cfg, path)
                check_kind(inner, value[inner], whole[inner])
            flat |= value if name == "model" else {}
        elif whole and value != whole.get("_name"):
            refuse(f"{name} has settings of its own; give a dictionary of those to change, got {value!r}")
        elif not whole and name not in chosen and name not in cfg:
            check_known(name, known, cfg, path)
            check_kind(name, value, known[name])
            flat[name] = value
    for check in plugins.override_rules:
        check(flat, groups["model"] | flat)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """To end a line that says that a name is unknown."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def check_known(name: str, known: Mapping[str, Any], cfg: Any, path: Any) -> None:
    if name in known:
        return
    plain = name.strip("-").replace("-", "_")
    if any(plain in all_settings(cfg[group]) for group in cfg if group not in GROUPS):
        refuse_flag(name, plain)
    refuse(f"the model of {path} has no setting {name}{did_you_mean(plain, known)}")


def check_kind(name: str, value: Any, present: Any) -> None:
    """Raises FlagError if a value is not of the kind of that which it replaces."""
    kind = type(present)
    if isinstance(present, Enum) or present is None or (isinstance(present, str) and "${" in present):
        return  # any value, or its own rules say which
    if kind is bool:
        fits = value in (True, False)
    elif kind in (int, float):
        # some of fairseq's own numbers with a fraction are 0 where nothing was given
        fits = isinstance(value, int if kind is int and present else (int, float))
        fits = fits and not isinstance(value, bool)
        if value is None:
            refuse(f"{name} must have a value, got None")
    else:
        fits = kind not in (str, dict) or value is None or isinstance(value, kind)
    if not fits:
        refuse(f"{name} must be of type {kind.__name__}, got {value!r}")
