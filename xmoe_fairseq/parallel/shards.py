"""Checkpoints of models too large to gather: each rank's experts in a file of their own.

checkpoint_last.pt holds everything but the experts, and names the files in `experts/` beside it that do.
Copies of it name the same files. Each expert is saved once, not once per replica, and a file is written
before anything names it, so a kill at any moment leaves the previous checkpoint whole.
"""

import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmoe_fairseq_compat.checkpoints import load
from xmoe_fairseq_compat.errors import CheckpointError

logger = logging.getLogger(__name__)

State = dict[str, Any]
FOLDER = "experts"
KEY = "expert_shards"  # in the checkpoint: {"id", "files"}
_part: ContextVar[tuple[int, int]] = ContextVar("part", default=(0, 1))


@contextmanager
def reading_part(index: int, parts: int) -> Iterator[None]:
    """In this block a checkpoint is read with the index-th of so many equal slices of the experts only."""
    token = _part.set((index, parts))
    try:
        yield
    finally:
        _part.reset(token)


def split_experts(state: State, names: list[str], slots: list[int]) -> tuple[State, State]:
    """A checkpoint without the experts, and the experts.

    Args:
        names: of the model's parameters that are stacks of experts.
        slots: their numbers in the optimizer's state.
    """
    wanted: dict[tuple[str, ...], list[Any]] = {
        ("model",): names,
        ("extra_state", "ema"): names,
        ("last_optimizer_state", "state"): slots,
    }
    rest, experts = dict(state), dict[str, State]()
    for path, keys in wanted.items():
        if path[0] not in state:
            continue
        holder = rest
        for key in path[:-1]:
            holder[key] = dict(holder.get(key) or {})
            holder = holder[key]
        entries = holder.get(path[-1])
        if entries:
            mine = experts["/".join(path)] = {key: entries[key] for key in keys if key in entries}
            # None keeps the experts' places: an optimizer numbers parameters by their order
            holder[path[-1]] = {key: None if key in mine else value for key, value in entries.items()}
    return rest, experts


def shard_names(identity: str, count: int) -> list[str]:
    return [f"{FOLDER}/{identity}_{index}-of-{count}.pt" for index in range(count)]


def write_shard(experts: State, folder: Path, identity: str, index: int, count: int) -> None:
    target = folder / shard_names(identity, count)[index]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    torch.save({"id": identity, "index": index, "count": count, "experts": experts}, temporary)
    os.replace(temporary, target)


def join_shards(state: State, path: str | Path) -> State:
    """Put the experts back into a checkpoint read from `path`: all, or those of `reading_part`.

    Raises:
        CheckpointError: names the file that is missing or does not belong to the checkpoint.
    """
    shards = state.pop(KEY, None)
    if shards is None:
        return state
    read = [_read_shard(Path(path), shards, index) for index in range(len(shards["files"]))]
    for group, entries in read[0].items():
        holder = state
        for key in group.split("/"):
            holder = holder[key]
        for key in entries:
            holder[key] = _join([shard[group][key] for shard in read])
    return state


def _read_shard(path: Path, shards: State, index: int) -> State:
    file = path.parent / shards["files"][index]
    if not file.is_file():
        raise CheckpointError(path, f"it needs {file}, which is missing; keep them in the same folder")
    shard = load(file, **mapped(file))  # a rank takes its own rows only
    parts = ("id", "index", "count")
    found = tuple(map(shard.get, parts)) if isinstance(shard, dict) else ()
    wanted = (shards["id"], index, len(shards["files"]))
    if found != wanted:
        raise CheckpointError(
            path, f"{file} is another checkpoint's: {found}, not {wanted}; copy the right one"
        )
    experts: State = shard["experts"]
    return experts


def mapped(path: Path) -> dict[str, Any]:
    """For torch.load: tensors are mapped, so that those nobody asks for are not read."""
    return {"map_location": "cpu", "mmap": zipfile.is_zipfile(path)}  # torch < 1.6 wrote no zip files


def _join(parts: list[Any]) -> Any:
    """Stack slices (or dicts of them), in the order of the experts; what is no stack is the same in all."""
    if isinstance(parts[0], dict):
        return {key: _join([part[key] for part in parts]) for key in parts[0]}
    if not isinstance(parts[0], Tensor) or parts[0].dim() == 0:
        return parts[0]
    index, slices = _part.get()
    sizes = [part.size(0) for part in parts]
    held = sum(sizes) // slices
    first, rows = index * held, []
    for part, start in zip(parts, [sum(sizes[:i]) for i in range(len(sizes))], strict=True):
        rows.append(part[max(first - start, 0) : max(first + held - start, 0)])
    return torch.cat(rows)


def remove_orphans(folder: Path) -> None:
    """Delete the experts that no checkpoint in `folder` names any more; none, if one there cannot be read."""
    try:
        named = {file for checkpoint in folder.glob("*.pt") for file in named_shards(checkpoint)}
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        reason = str(error).splitlines()[0]
        logger.warning(
            f"experts that may be in no use stay in {folder}: a checkpoint cannot be read: {reason}"
        )
        return
    for path in (folder / FOLDER).glob("*"):
        if f"{FOLDER}/{path.name}" not in named and re.fullmatch(r".+_\d+-of-\d+\.(pt|tmp)", path.name):
            path.unlink()


def named_shards(checkpoint: Path) -> list[str]:
    state = load(checkpoint, **mapped(checkpoint))
    return list(state[KEY]["files"]) if isinstance(state, dict) and KEY in state else []
