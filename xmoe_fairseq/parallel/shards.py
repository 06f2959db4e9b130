"""Checkpoints of models too large to gather: each rank's experts in a file of their own.

checkpoint_last.pt holds everything but the experts, and names the files in `experts/` beside it that do.
Copies of it name the same files. Each expert is saved once, not once per replica, and a file is written
before anything names it, so a kill at any moment leaves the previous checkpoint whole.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xmoe_fairseq_compat import folder_lock
from xmoe_fairseq_compat.checkpoints import load
from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.files import MAPPED, write_atomically

logger = logging.getLogger(__name__)

State = dict[str, Any]
FOLDER = "experts"
KEY = "expert_shards"  # in the checkpoint: {"id", "files"}
GROUPS = ("model", "extra_state/ema", "last_optimizer_state/state")  # of a checkpoint; where experts lie
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
    rest, experts = state, dict[str, State]()
    wanted: tuple[list[Any], ...] = (names, names, slots)
    for group, keys in zip(GROUPS, wanted, strict=True):
        entries = _holder(state, group)
        if mine := {key: entries[key] for key in keys if key in entries}:
            experts[group] = mine
            # None keeps the experts' places: an optimizer numbers parameters by their order
            left = {key: None if key in mine else value for key, value in entries.items()}
            rest = _replaced(rest, group.split("/"), left)
    return rest, experts


def _replaced(state: State, path: list[str], value: State) -> State:
    return {**state, path[0]: _replaced(state[path[0]], path[1:], value) if path[1:] else value}


def shard_names(identity: str, count: int) -> list[str]:
    return [f"{FOLDER}/{identity}_{index}-of-{count}.pt" for index in range(count)]


def write_shard(experts: State, folder: Path, identity: str, index: int, count: int) -> None:
    """Raises WriteError."""
    shard = {"id": identity, "index": index, "count": count, "experts": experts}
    write_atomically(folder / shard_names(identity, count)[index], lambda file: torch.save(shard, file))


def join_shards(state: State, path: str | Path) -> State:
    """Put the experts back into a checkpoint read from `path`: all, or those of `reading_part`.

    Raises:
        CheckpointError: names the file that is missing, damaged or does not belong to the checkpoint.
    """
    files = shard_files(state, path)
    shards = state.pop(KEY, None)
    read = [_read_shard(Path(path), shards["id"], files, index) for index in range(len(files))]
    for file, shard in zip(files, read, strict=True):
        for group in {*GROUPS, *shard}:
            wanted = {key for key, value in _holder(state, group).items() if value is None}
            names = shard.get(group, {}).keys()
            for kind, found in (("has no", wanted - names), ("has besides", names - wanted)):
                if found:
                    problem = f"{file} {kind} {min(map(str, found))} in {group}; copy the right one"
                    raise CheckpointError(path, problem)
    for group, entries in read[0].items() if read else ():
        holder = _holder(state, group)
        for key in entries:
            try:
                holder[key] = _join([shard[group][key] for shard in read])
            except (AttributeError, KeyError, RuntimeError, TypeError) as error:
                problem = f"{key} in {group} is of another kind or size in one of its files than in another"
                raise CheckpointError(path, f"{problem}; copy them again") from error
    return state


def _holder(state: State, group: str) -> State:
    """The entries of a group; none if the checkpoint has no such group."""
    holder: Any = state
    for key in group.split("/"):
        holder = holder.get(key) if isinstance(holder, dict) else None
    return holder if isinstance(holder, dict) else {}


def shard_files(state: State, path: str | Path) -> list[str]:
    """The files that hold a checkpoint's experts, seen from its folder. Raises CheckpointError."""
    if (shards := state.get(KEY)) is None:
        return []
    files = shards.get("files") if isinstance(shards, dict) and isinstance(shards.get("id"), str) else None
    if not (files and isinstance(files, list)) or not all(
        re.fullmatch(rf"{FOLDER}/[^/]+", str(file)) for file in files
    ):
        raise CheckpointError(path, f"its entry {KEY!r} is damaged: {str(shards)[:60]}; copy it again")
    return files


def _read_shard(path: Path, identity: Any, files: list[str], index: int) -> State:
    file = path.parent / files[index]
    if not file.is_file():
        raise CheckpointError(path, f"it needs {file}, which is missing; keep them in the same folder")
    shard = load(file, **MAPPED)  # a rank takes its own rows only
    found = tuple(map(shard.get, ("id", "index", "count"))) if isinstance(shard, dict) else ()
    wanted = (identity, index, len(files))
    if found != wanted:
        problem = f"{file} is another checkpoint's: {found}, not {wanted}; copy the right one"
        raise CheckpointError(path, problem)
    experts = shard.get("experts")
    if not isinstance(experts, dict) or not all(isinstance(group, dict) for group in experts.values()):
        raise CheckpointError(file, "it holds no experts; copy it again")
    return experts


def _join(parts: list[Any]) -> Any:
    """Stack slices (or dicts of them), in the order of the experts; what is no stack is the same in all."""
    if isinstance(parts[0], dict):
        return {key: _join([part[key] for part in parts]) for key in parts[0]}
    if not isinstance(parts[0], Tensor) or parts[0].dim() == 0:
        return parts[0]
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError("no tensors")
    index, slices = _part.get()
    held = sum(part.size(0) for part in parts) // slices
    rows, start = [], index * held  # the latter seen from the first row of a part
    for part in parts:
        rows.append(part[max(start, 0) : max(start + held, 0)])
        start -= part.size(0)
    return torch.cat(rows)


def remove_orphans(folder: Path) -> None:
    """Delete the experts that no file in `folder` names any more; none, if a checkpoint cannot be read."""
    try:
        # To open and close the lock file in the process that holds it would let go of it.
        copies = [path for path in folder.iterdir() if path.is_file() and path.name != folder_lock.NAME]
        named = {file for copy in copies for file in named_shards(copy)}
    except (CheckpointError, OSError) as error:
        why = f"a checkpoint cannot be read: {str(error).splitlines()[0]}"
        logger.warning(f"experts that may be in no use stay in {folder}: {why}")
        return
    for path in (folder / FOLDER).glob("*"):
        is_ours = re.fullmatch(r".+_\d+-of-\d+\.(pt(\.tmp)?|tmp)", path.name)
        if is_ours and f"{FOLDER}/{path.name}" not in named:
            with suppress(OSError):  # what cannot be removed does no harm
                path.unlink()


def named_shards(checkpoint: Path) -> list[str]:
    """The files that a checkpoint names; none if it is whole, or if a file under another name than *.pt, such
    as a log or a copy that is still being made, is no checkpoint at all."""
    try:
        state = load(checkpoint, sums=False, **MAPPED)
    except CheckpointError:
        if checkpoint.suffix == ".pt":
            raise
        return []
    return shard_files(state, checkpoint) if isinstance(state, dict) and KEY in state else []
