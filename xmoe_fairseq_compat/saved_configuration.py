"""The configuration in a checkpoint: of plain values, and no larger than it looks."""

from __future__ import annotations

import re
from typing import Any

from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.reading import children, plain

DEEPEST = 50  # level of a configuration: a choice; fairseq's own have fewer than 10
REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # to something in the same configuration
HOPS = 5  # from one reference to another: a choice
NOTHING = object()


def check_configuration(file: Any, cfg: Any) -> None:
    """Raises CheckpointError for a configuration that grows when it is read: parts that are used in many
    places, or in themselves, and references (`${...}`) that are not to a plain value in it: they may be to
    the environment, too."""
    sizes: dict[int, int] = {}
    own = 0

    def written_out(value: Any, name: str, depth: int) -> int:
        """The number of entries, those that are used twice counted twice."""
        nonlocal own
        if id(value) in sizes and sizes[id(value)] == 0 or depth > DEEPEST:
            problem = f"its configuration is nested without end at {name[:60]}; do not use it"
            raise CheckpointError(file, problem)
        if id(value) in sizes:
            return sizes[id(value)]
        text = plain(value)
        if isinstance(text, str) and "${" in text:
            target = referred_to(cfg, text)
            if target is not NOTHING:
                return 1 + (len(target) if isinstance(target, list) else 0)
            problem = f"{name} is {text[:60]!r}, a reference; its configuration must hold plain values"
            raise CheckpointError(file, problem)
        sizes[id(value)] = 0  # in progress
        found = list(children(value))
        own += len(found)
        sizes[id(value)] = 1 + sum(written_out(child, f"{name}.{key}", depth + 1) for key, child in found)
        return sizes[id(value)]

    total = written_out(cfg, "cfg", 0)
    if total > 10 * max(own, 1000):  # a choice: YAML's aliases stand for a few others in honest files
        problem = (
            f"its configuration has {own:,} entries that become {total:,} when they are read; do not use it"
        )
        raise CheckpointError(file, problem)


def referred_to(cfg: Any, text: str) -> Any:
    """The plain value, or list of such, for which a text like `${optimization.lr}` stands; else NOTHING."""
    value: Any = text
    for _ in range(HOPS):
        if not (isinstance(value, str) and "${" in value):
            break
        value = _at(cfg, value)
    parts = value if isinstance(value, list) else [value]
    are_plain = all(part is None or isinstance(part, (bool, int, float, str)) for part in map(plain, parts))
    return value if are_plain and not any("${" in str(plain(part)) for part in parts) else NOTHING


def _at(cfg: Any, text: str) -> Any:
    found = REFERENCE.fullmatch(text)
    value = plain(cfg) if found else NOTHING
    for name in found[1].split(".") if found else ():
        value = plain(value.get(name, NOTHING)) if isinstance(value, dict) else NOTHING
    return value


def follow_references(cfg: Any) -> None:
    """Put values in the place of references to them, which fairseq saved until May 2021.

    Args:
        cfg: one that `check_configuration` has passed. (One of omegaconf's follows its references itself.)
    """

    def follow(node: Any) -> None:
        for key, child in list(children(node)):
            if isinstance(child, str) and "${" in child:
                target = referred_to(cfg, child)
                node[key] = list(target) if isinstance(target, list) else target
            elif isinstance(child, (dict, list)):
                follow(child)

    if isinstance(cfg, dict):
        follow(cfg)
