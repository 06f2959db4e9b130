"""Whether a checkpoint's tensors are all there, numbers, and as they were written."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmoe_fairseq.parallel.shards import shard_files
from xmoe_fairseq_compat.checkpoints import load
from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.files import MAPPED
from xmoe_fairseq_compat.reading import check_zip

LAYER = re.compile(r"(?P<side>.*\.layers)\.(?P<number>\d+)\.(?P<name>.+)")
UNSET = re.compile(r".*_float_tensor$")  # fairseq never sets this buffer, nor reads it


def check_are_tensors(model: Any, path: Path) -> None:
    """Raises CheckpointError."""
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise CheckpointError(path, "its entry 'model' is damaged: no dictionary of tensors by their names")
    for name, value in model.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(path, f"{name} is {'missing' if value is None else 'no tensor'}")


def check_tensors(model: dict[str, Any], path: Path) -> None:
    """
    Layers of one side that are of one kind, with experts or without, must hold tensors of the same names.

    Raises:
        CheckpointError: an entry is no tensor, or holds NaN or inf; or a layer has one that its like has not.
    """
    check_are_tensors(model, path)
    for name, value in model.items():
        if not UNSET.fullmatch(name) and value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(path, f"{name} holds NaN or inf; take an earlier checkpoint")
    layers: dict[tuple[str, bool], dict[str, set[str]]] = defaultdict(dict)
    for side, numbers in _names_of_layers(model).items():
        for number, names in numbers.items():
            has_experts = any(name.startswith("moe.") for name in names)
            layers[side, has_experts][f"{side}.{number}"] = names
    for alike in layers.values():
        all_names = set.union(*alike.values())
        for layer, names in alike.items():
            if lacking := sorted(all_names - names):
                like = next(other for other in alike if lacking[0] in alike[other])
                raise CheckpointError(path, f"{layer} has no {lacking[0]}, which {like} has")
            for stack in _incomplete_stacks(names):
                raise CheckpointError(path, f"{layer} has no {stack}")


def _names_of_layers(model: dict[str, Any]) -> dict[str, dict[str, set[str]]]:
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in model:
        if match := LAYER.fullmatch(name):
            found[match["side"]][match["number"]].add(match["name"])
    return found


def _incomplete_stacks(names: set[str]) -> list[str]:
    """What a layer with experts always has, and this one has not."""
    wanted = [f"moe.experts.fc{i}_{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    is_ours = any(name.startswith("moe.experts.fc") for name in names)
    return [name for name in wanted if name not in names] if is_ours else []


def damage(path: Path, index: int, parts: int) -> CheckpointError | None:
    """What is wrong, by their checksums, with the index-th of so many shares of a sharded checkpoint's files.

    For ranks that each want a part of every file, and together are to look at each byte once.
    """
    try:
        experts = shard_files(load(path, sums=False, **MAPPED), path)
        for file in [path, *(path.parent / name for name in experts)][index::parts]:
            if file.is_file():
                check_zip(file)
    except CheckpointError as error:
        return error
    return None
