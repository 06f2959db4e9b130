"""xmoe-checkpoint {info,merge,shard}: show and convert checkpoints, their experts in one or many files."""

import argparse
import re
import secrets
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fairseq.checkpoint_utils  # noqa: F401  (its patch says which types a checkpoint may hold)
import torch
from torch import Tensor

from xmoe_fairseq.parallel.shards import (
    KEY,
    State,
    join_shards,
    shard_files,
    shard_names,
    split_experts,
    write_shard,
)
from xmoe_fairseq.parallel.whole import check_are_tensors, check_tensors
from xmoe_fairseq_compat.checkpoints import load_checkpoint
from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.files import MAPPED, write_atomically
from xmoe_fairseq_compat.misfits import settings_of
from xmoe_fairseq_compat.reading import without_sums

EXPERTS = re.compile(r".+\.experts\.fc[12]_(weight|bias)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="xmoe-checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what a checkpoint holds, and in which files")
    merge = commands.add_parser("merge", help="put the experts of a sharded checkpoint into one file")
    shard = commands.add_parser("shard", help="put the experts of a checkpoint into several files")
    for command in (info, merge, shard):
        command.add_argument("checkpoint", type=Path)
    for command in (merge, shard):
        command.add_argument("output", type=Path, help="must not exist yet")
        command.add_argument(
            "--skip-checksums", action="store_true",
            help="do not read the whole input first to find damaged bytes",
        )  # fmt: skip
    shard.add_argument(
        "--parts", metavar="N", type=int, required=True, help="2 or more files; must divide the experts"
    )
    arguments = parser.parse_args()
    if arguments.command == "shard" and arguments.parts < 2:
        shard.error(
            f"--parts must be 2 or more (merge puts all experts into one file), got {arguments.parts}"
        )
    try:
        if arguments.command == "info":  # which looks at no values
            with without_sums():
                print("\n".join(describe(arguments.checkpoint)))
            return
        with without_sums() if arguments.skip_checksums else nullcontext():
            convert(arguments.checkpoint, arguments.output, getattr(arguments, "parts", 1))
    except (CheckpointError, ValueError, OSError) as error:
        parser.exit(1, f"xmoe-checkpoint: {error}\n")


def read(path: Path) -> State:
    state: State = load_checkpoint(path, **MAPPED)
    return state


def describe(path: Path) -> list[str]:
    state = read(path)
    files = [path.parent / file for file in shard_files(state, path)]
    whole = join_shards(state, path)["model"]
    check_are_tensors(whole, path)
    stacks = {name: value for name, value in whole.items() if EXPERTS.fullmatch(name)}
    experts = sum(value.numel() for value in stacks.values())
    layers = [f"  {name}: {list(value.shape)}" for name, value in stacks.items() if "fc1_weight" in name]
    return [
        f"{path}: {updates(state)} updates, {model_name(state)}",
        f"parameters: {sum(v.numel() for v in whole.values()):,}, of these in experts {experts:,}",
        f"optimizer state: {'yes' if state.get('last_optimizer_state') else 'no'}",
        *(["experts (number, width, model width):", *layers] if layers else ["experts: none"]),
        f"expert files: {len(files) or 'none, all in this one'}",
        *(f"  {file}: {file.stat().st_size:,} bytes" for file in files),
    ]


def updates(state: State) -> Any:
    """How many the model has had; "?" if the checkpoint does not say."""
    history = state.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    return last.get("num_updates", "?") if isinstance(last, dict) else "?"


def model_name(state: State) -> str:
    """As --arch named it; fairseq's older checkpoints have `args` in the place of `cfg`."""
    settings = settings_of(state)
    return str(settings.get("_name") or settings.get("arch", "no configuration"))


def convert(source: Path, target: Path, parts: int) -> None:
    """Write `source` with its experts in `parts` files; 1 = in the checkpoint itself."""
    if target.exists():
        raise ValueError(f"{target} exists already; name a file that does not")
    state = join_shards(read(source), source)
    check_tensors(state["model"], source)
    names = [name for name in state["model"] if EXPERTS.fullmatch(name)]
    if not names:
        raise ValueError(f"{source} holds no experts: its model is {model_name(state)}")
    written: list[Path] = []
    if parts > 1:
        state, experts = split_experts(state, names, expert_slots(state))
        identity = f"{updates(state)}-{secrets.token_hex(4)}"
        state[KEY] = {"id": identity, "files": shard_names(identity, parts)}
        written = [target.parent / file for file in state[KEY]["files"]]
    try:
        for index in range(len(written)):
            write_shard(_slice(experts, index, parts), target.parent, identity, index, parts)
        write_atomically(target, lambda file: torch.save(state, file))
    except BaseException:  # Ctrl-C, too
        for file in written:
            file.unlink(missing_ok=True)
        raise


def expert_slots(state: State) -> list[int]:
    """Which of the optimizer's numbered states are the experts': it numbers the parameters in their order."""
    slots: Any = (state.get("last_optimizer_state") or {}).get("state", {})
    if not slots:
        return []
    if not isinstance(slots, dict) or not all(isinstance(slot, dict) for slot in slots.values()):
        raise ValueError("the optimizer's state is damaged; take another checkpoint")
    names = iter(state["model"])
    found = []
    for index in sorted(slots):
        shapes = [v.shape for v in slots[index].values() if isinstance(v, Tensor) and v.dim()]
        # The model also holds buffers, and parameters that share their weights with an earlier one.
        name = next((name for name in names if not shapes or state["model"][name].shape == shapes[0]), None)
        if name is None:
            raise ValueError("the optimizer's state does not fit the model; save without it, then convert")
        if EXPERTS.fullmatch(name):
            found.append(index)
    return found


def _slice(value: Any, index: int, parts: int) -> Any:
    if isinstance(value, dict):
        return {key: _slice(entry, index, parts) for key, entry in value.items()}
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if value.size(0) % parts:
        raise ValueError(f"--parts must divide the number of experts {value.size(0)}, got {parts}")
    held = value.size(0) // parts
    return value[index * held : (index + 1) * held].clone()
