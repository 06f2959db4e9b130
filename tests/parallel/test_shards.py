"""Experts in files of their own: found, merged, cleaned up, whole after a kill."""

import os
import shutil
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from commands import call
from distributed import run_ranks
from fairseq import checkpoint_utils
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from parallel_checkpoints import UPDATES, assert_continues, load, train_to
from parallel_runs import (
    EXACT,
    MT,
    UNUSED,
    fairseq_train,
)

from xmoe_fairseq.parallel.checkpoint_command import main
from xmoe_fairseq.parallel.shards import remove_orphans, write_shard
from xmoe_fairseq_compat.errors import CheckpointError

SHARDED = ("--moe-sharded-checkpoints",)


@pytest.mark.parametrize("before, after", [((4, 4), (2, 2)), ((4, 2), (1, 1))])
def test_any_layout_continues_from_shards(
    before: tuple[int, int], after: tuple[int, int], written: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = written(*before, *SHARDED)[0]
    assert_continues(folder / "checkpoint_last.pt", after, written, corpus, tmp_path)
    files = sorted((folder / "experts").iterdir())
    assert len(files) == before[1]  # each expert once, however many replicas and copies of the checkpoint
    assert (folder / f"checkpoint_1_{UPDATES}.pt").exists()
    assert not any(
        torch.is_tensor(v)
        for k, v in load(folder / "checkpoint_last.pt")["model"].items()
        if ".experts." in k
    )


tool = partial(call, main, "xmoe-checkpoint")


def test_shards_merge_into_what_one_process_writes_and_back(written: Any, tmp_path: Path) -> None:
    source = written(4, 4, *SHARDED)[0] / "checkpoint_last.pt"
    whole, halves, again = (tmp_path / name for name in ("whole.pt", "halves.pt", "again.pt"))
    assert tool("merge", source, whole) == (0, "")
    expected = load(written(4, 4)[0] / "checkpoint_last.pt")
    assert list(load(whole)["model"]) == list(expected["model"])
    assert_same_state(load(whole), expected)
    assert tool("shard", whole, halves, "--parts", 2) == (0, "")
    assert len(list((tmp_path / "experts").iterdir())) == 2
    assert tool("merge", halves, again) == (0, "")
    assert_same_state(load(again), expected)
    status, text = tool("info", source)
    assert status == 0 and "2 updates, xmoe_transformer" in text and "expert files: 4" in text
    assert "expert files: none" in tool("info", whole)[1]


def assert_same_state(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected["model"].items():
        if not UNUSED.search(name):
            assert torch.equal(got["model"][name], value), name
    for index, slot in expected["last_optimizer_state"]["state"].items():
        for name, value in slot.items():
            assert torch.equal(
                *(torch.as_tensor(v) for v in (got["last_optimizer_state"]["state"][index][name], value))
            )


def test_a_missing_or_foreign_shard_is_named(written: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written(4, 4, *SHARDED)[0], folder)
    first, second = sorted((folder / "experts").iterdir())[:2]
    checkpoint = folder / "checkpoint_last.pt"
    first.write_bytes(second.read_bytes())
    status, text = tool("merge", checkpoint, tmp_path / "whole.pt")
    assert status == 1 and f"cannot load checkpoint {checkpoint}: {first} is another checkpoint's" in text
    first.write_bytes(second.read_bytes()[:-100])
    status, text = tool("merge", checkpoint, tmp_path / "whole.pt")
    assert status == 1 and f"cannot load checkpoint {first}: it is damaged" in text
    first.unlink()
    status, text = tool("merge", checkpoint, tmp_path / "whole.pt")
    assert status == 1 and f"cannot load checkpoint {checkpoint}: it needs {first}, which is missing" in text
    with pytest.raises(CheckpointError, match=first.name):  # ends a fairseq command with one line
        checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))
    assert not (tmp_path / "whole.pt").exists()


def test_the_tool_says_in_one_line_what_it_cannot_convert(written: Any, tmp_path: Path) -> None:
    whole, new = written(1, 1)[0] / "checkpoint_last.pt", tmp_path / "new" / "checkpoint.pt"
    dense, tensor, text = (tmp_path / name for name in ("dense.pt", "tensor.pt", "text.pt"))
    state = torch.load(whole, weights_only=True)
    torch.save({**state, "model": {"weight": torch.ones(1)}}, dense)
    torch.save(torch.ones(1), tensor)
    text.write_text("no checkpoint")
    for status, message, arguments in (
        (1, "--parts must divide the number of experts 8, got 3", ("shard", whole, new, "--parts", 3)),
        (2, "--parts must be 2 or more", ("shard", whole, new, "--parts", 0)),
        (1, f"{whole} exists already", ("shard", whole, whole, "--parts", 2)),
        (1, f"{dense} holds no experts", ("merge", dense, new)),
        (1, f"cannot load checkpoint {tensor}: it has no entry 'model'", ("info", tensor)),
        (1, f"cannot load checkpoint {text}: it is damaged or no checkpoint", ("merge", text, new)),
        (1, "No such file", ("info", tmp_path / "none.pt")),
    ):
        got, printed = tool(*arguments)
        assert got == status and message in printed and "Traceback" not in printed
        assert printed.startswith("xmoe-checkpoint: error: ") and printed.count("\n") == 1
    assert not new.exists() and "experts: none" in tool("info", dense)[1]


def test_experts_that_no_checkpoint_names_are_removed(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    flags = (corpus[0], *MT, *EXACT, *SHARDED, "--keep-interval-updates", 3)
    train_to(14, 2, 2, tmp_path, *flags)
    kept = sorted(tmp_path.glob("*.pt"))
    assert len({load(path)["expert_shards"]["id"] for path in kept}) >= 3
    for path in kept:  # all of them can be read whole
        assert load_checkpoint_to_cpu(str(path))["model"]
    files = {path.name for path in (tmp_path / "experts").iterdir()}
    assert not any(file.startswith("2-") for file in files)  # let go of


def test_a_file_that_is_no_checkpoint_keeps_all_experts_and_the_run_going(tmp_path: Path) -> None:
    write_shard({}, tmp_path, "5-abc", 0, 1)
    remove_orphans(tmp_path)
    assert not list((tmp_path / "experts").iterdir())  # nothing names it
    write_shard({}, tmp_path, "5-abc", 0, 1)
    (tmp_path / "old.pt").write_bytes(b"half a checkpoint")
    remove_orphans(tmp_path)
    assert len(list((tmp_path / "experts").iterdir())) == 1


@pytest.mark.parametrize(
    "form, call",
    [((), "shutil.copyfileobj"), (SHARDED, "torch.save"), (SHARDED, "os.replace")],
    ids=["while the last checkpoint is copied", "amid a shard", "between the shards and the checkpoint"],
)
def test_a_kill_while_saving_leaves_the_previous_checkpoint_whole(
    form: tuple[str, ...], call: str, written: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(written(2, 2, *form)[0], folder)

    plain_save, plain_replace = torch.save, os.replace

    def killed(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(target, BytesIO):  # a message to the other ranks
            return plain_save(source, target)
        if call != "os.replace":
            Path(target.name).write_bytes(b"half")
        elif "experts" in str(target):
            return plain_replace(source, target)
        os._exit(1)

    def ranks() -> None:
        if dist.get_rank() == 0:
            patch(call, killed).start()
        with pytest.raises(RuntimeError):  # the other rank, left alone
            fairseq_train(
                corpus[0], *MT, *EXACT, *form, "--update-freq", 2, "--moe-expert-parallel-size", 2,
                "--ddp-backend", "legacy_ddp", "--save-interval-updates", 1, "--disable-validation",
                "--save-dir", folder, "--max-update", 8,
            )  # fmt: skip

    assert run_ranks(2, ranks) == [None, None]
    state = checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint_last.pt"))
    # Update 3 ends the epoch, and saves one file only: the first copy is made at update 4.
    whole = UPDATES + 1 if call == "shutil.copyfileobj" else UPDATES
    assert state["optimizer_history"][-1]["num_updates"] == whole
    assert all(torch.is_tensor(value) for value in state["model"].values())
