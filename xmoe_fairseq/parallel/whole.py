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
STACKS = [f"moe.experts.fc{i}_{kind}" for i in (1, 2) for kind in ("weight", "bias")]
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
    names: dict[tuple[str, str], set[str]] = defaultdict(set)  # of one layer's tensors, by side and number
    for match in filter(None, map(LAYER.fullmatch, model)):
        names[match["side"], match["number"]].add(match["name"])
    kinds: dict[tuple[str, bool], dict[str, set[str]]] = defaultdict(dict)
    for (side, number), found in names.items():
        has_experts = any(name.startswith("moe.") for name in found)
        kinds[side, has_experts][f"{side}.{number}"] = found
    for alike in kinds.values():
        all_names = set.union(*alike.values())
        for layer, found in alike.items():
            if lacking := sorted(all_names - found):
                like = next(other for other in alike if lacking[0] in alike[other])
                raise CheckpointError(path, f"{layer} has no {lacking[0]}, which {like} has")
            is_ours = any(name.startswith("moe.experts.fc") for name in found)
            if is_ours and (lacking := [stack for stack in STACKS if stack not in found]):
                raise CheckpointError(path, f"{layer} has no {lacking[0]}")


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
