"""xmoe-checkpoint {info,merge,shard}: show and convert checkpoints, their experts in one or many files."""

import re
import secrets
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fairseq.checkpoint_utils  # noqa: F401  (its patch says which types a checkpoint may hold)
import torch
from torch import Tensor

from xmoe_fairseq.activated import describe as describe_activated
from xmoe_fairseq.moe.stats import ffn_parameters
from xmoe_fairseq.parallel import shards
from xmoe_fairseq.parallel.shards import State
from xmoe_fairseq.parallel.whole import check_are_tensors, check_tensors
from xmoe_fairseq_compat.checkpoints import load_checkpoint
from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.files import MAPPED, write_atomically
from xmoe_fairseq_compat.misfits import settings_of
from xmoe_fairseq_compat.reading import without_sums
from xmoe_fairseq_compat.usage import Parser

EXPERTS = re.compile(r".+\.experts\.fc[12]_(weight|bias)")
ROWS = ("rows_kept_E", "rows_shared")  # as routing_log.py logs them


def argument_parser() -> Parser:
    parser = Parser("xmoe-checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what a checkpoint holds, and in which files")
    merge = commands.add_parser("merge", help="put the experts of a sharded checkpoint into one file")
    shard = commands.add_parser("shard", help="put the experts of a checkpoint into several files")
    for command in (info, merge, shard):
        command.add_argument(
            "checkpoint", type=Path, help="of fairseq, with its experts in one or many files"
        )
    for command in (merge, shard):
        command.add_argument("output", type=Path, help="checkpoint to write; must not exist yet")
        command.add_argument("--skip-checksums", action="store_true",
                             help="do not read the whole input first to find damaged bytes")  # fmt: skip
    shard.add_argument("--parts", metavar="N", type=int, required=True,
                       help="2 or more files; must divide the experts")  # fmt: skip
    return parser


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    with without_sums() if args.command == "info" or args.skip_checksums else nullcontext():
        if args.command == "info":  # which looks at no values
            print("\n".join(describe(args.checkpoint)))
            return
        parts = args.parts if args.command == "shard" else 1
        if args.command == "shard" and parts < 2:
            parser.error(f"--parts must be 2 or more (merge puts all experts into one file), got {parts}")
        convert(args.checkpoint, args.output, parts)


def read(path: Path) -> State:
    state: State = load_checkpoint(path, **MAPPED)
    return state


def describe(path: Path) -> list[str]:
    state = read(path)
    files = [path.parent / file for file in shards.shard_files(state, path)]
    whole = shards.join_shards(state, path)["model"]
    check_are_tensors(whole, path)
    stacks = {name: value for name, value in whole.items() if EXPERTS.fullmatch(name)}
    experts, parameters = (sum(v.numel() for v in held.values()) for held in (stacks, whole))
    first = {name: list(value.shape) for name, value in stacks.items() if "fc1_weight" in name}
    layers = [f"  {name}: {shape}" for name, shape in first.items()]
    return [
        f"{path}: {updates(state)} updates, {model_name(state)}",
        f"parameters: {parameters:,}, of these in experts {experts:,}",
        *activated(parameters - experts, [*first.values()], settings_of(state)),
        *measured(state),
        f"optimizer state: {'yes' if state.get('last_optimizer_state') else 'no'}",
        *(["experts (number, width, model width):", *layers] if layers else ["experts: none"]),
        f"expert files: {len(files) or 'none, all in this one'}",
        *(f"  {file}: {file.stat().st_size:,} bytes" for file in files),
    ]


def activated(shared: int, shapes: list[list[int]], settings: dict[str, Any]) -> list[str]:
    """Of models whose experts are stacked: shapes (E, F, D)."""
    if not shapes or any(len(shape) != 3 for shape in shapes):
        return []
    numbers, widths, model_widths = zip(*shapes, strict=True)
    return [describe_activated(shared, numbers, [*map(ffn_parameters, model_widths, widths)], settings)]


def measured(state: State) -> list[str]:
    """Experts per token, shared ones included, of what the run had logged when it wrote the checkpoint."""
    for group, where in (("valid", "the last validation"), ("train", "training, since its epoch began")):
        try:
            entries = state["extra_state"]["metrics"][group]
            sums = {name: float(meter["sum"].sum()) for _, name, _, meter in entries if "_moe_" in name}
            found = [
                f"{side} {sum(sums[f'_moe_{side}_{rows}'] for rows in ROWS) / tokens:.2f}"
                for side in ("encoder", "decoder") if (tokens := sums.get(f"_moe_{side}_tokens"))
            ]  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError):  # none, or damaged
            found = []
        if found:
            return [f"experts per token in {where}: {', '.join(found)}"]
    return []


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
        raise UserError(f"{target} exists already; name a file that does not")
    state = shards.join_shards(read(source), source)
    check_tensors(state["model"], source)
    names = [name for name in state["model"] if EXPERTS.fullmatch(name)]
    if not names:
        raise UserError(f"{source} holds no experts: its model is {model_name(state)}")
    files: list[str] = []
    if parts > 1:
        state, experts = shards.split_experts(state, names, expert_slots(state))
        identity = f"{updates(state)}-{secrets.token_hex(4)}"
        files = shards.shard_names(identity, parts)
        state[shards.KEY] = {"id": identity, "files": files}
    try:
        for index in range(len(files)):
            shards.write_shard(_slice(experts, index, parts), target.parent, identity, index, parts)
        write_atomically(target, lambda file: torch.save(state, file))
    except BaseException:  # Ctrl-C, too
        for file in files:
            (target.parent / file).unlink(missing_ok=True)
        raise


def expert_slots(state: State) -> list[int]:
    """Which of the optimizer's numbered states are the experts': it numbers the parameters in their order."""
    slots: Any = (state.get("last_optimizer_state") or {}).get("state", {})
    if not slots:
        return []
    if not isinstance(slots, dict) or not all(isinstance(slot, dict) for slot in slots.values()):
        raise UserError("the optimizer's state is damaged; take another checkpoint")
    names = iter(state["model"])
    found = []
    for index in sorted(slots):
        shapes = [v.shape for v in slots[index].values() if isinstance(v, Tensor) and v.dim()]
        # The model also holds buffers, and parameters that share their weights with an earlier one.
        name = next((name for name in names if not shapes or state["model"][name].shape == shapes[0]), None)
        if name is None:
            raise UserError("the optimizer's state does not fit the model; save without it, then convert")
        if EXPERTS.fullmatch(name):
            found.append(index)
    return found


def _slice(value: Any, index: int, parts: int) -> Any:
    if isinstance(value, dict):
        return {key: _slice(entry, index, parts) for key, entry in value.items()}
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if value.size(0) % parts:
        raise UserError(f"--parts must divide the number of experts {value.size(0)}, got {parts}")
    return value.chunk(parts)[index].clone()
