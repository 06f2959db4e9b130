"""What a plugin (a --user-dir) adds to this package, which knows none: it registers when it is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any, Protocol


class Meter(Protocol):
    """Counts what a model computes while it is entered."""

    def __enter__(self) -> object: ...
    def __exit__(self, *_: object) -> None: ...

    def line(self) -> str:
        """Of what was counted on all ranks, each of which asks for it."""


# Each gets a checkpoint that fairseq has read, its path and what overrides its configuration, None where no
# model is built of it; and gives the checkpoint to go on with.
after_load: list[Callable[[dict[str, Any], Any, dict[str, Any] | None], dict[str, Any]]] = []
# Each gets what --model-overrides changes and the model's settings, as overridden; raises FlagError.
override_rules: list[Callable[[dict[str, Any], dict[str, Any]], None]] = []
# Regular expressions: settings of a model that change the number or the sizes of its weights.
shaping: list[str] = []
# Each gets a model that a command has opened to evaluate it, the checkpoint's path and what overrides its
# configuration; and gives a `Meter`, or None.
meters: list[Callable[[Any, str, dict[str, Any]], Meter | None]] = []
# Each gets a model of which somebody is about to use the result, and raises what was wrong with it.
checks: list[Callable[[Any], None]] = []
# Regular expressions: statistics that are logged, but not shown to people (--log-format simple, tqdm).
unshown: list[str] = []
# Whether the configuration goes to a file, and one line of the log says to which.
brief = False

# The group of entry points in which an installed plugin declares how its names begin (of models and the like,
# of flags, of entries of checkpoints), as `moe_ = its_user_dir`: it has to be named where it is not loaded.
NAMES = "xmoe_fairseq_compat.names"


def plugin_of(name: str) -> metadata.EntryPoint | None:
    """Of the plugin that declares a name's beginning: `name` is the beginning, `value` the --user-dir."""
    plain = name.lstrip("-").replace("-", "_")
    found = metadata.entry_points(group=NAMES)
    return next((declared for declared in found if plain.startswith(declared.name)), None)


def is_command(name: str) -> bool:
    """Whether this is a console script of a plugin."""
    plugins = {declared.value for declared in metadata.entry_points(group=NAMES)}
    scripts = metadata.entry_points(group="console_scripts")
    return any(script.name == name and script.module.partition(".")[0] in plugins for script in scripts)


def models() -> list[str]:
    """Names of those that a --user-dir has registered."""
    registry = getattr(sys.modules.get("fairseq.models"), "MODEL_REGISTRY", {})
    return [name for name, model in registry.items() if not model.__module__.startswith("fairseq.")]
