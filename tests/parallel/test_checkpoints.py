"""One checkpoint for any number of ranks: whoever wrote it, anyone continues with the same curve."""

import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from fairseq import checkpoint_utils
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from parallel_runs import (
    EXACT,
    MT,
    UNUSED,
    Run,
    assert_same_training,
    fairseq_train,
    train,
)
from tolerances import assert_same

from xmoe_fairseq.parallel.shards import remove_orphans, write_shard
from xmoe_fairseq.parallel.tool import main
from xmoe_fairseq_compat.errors import CheckpointError

UPDATES = 2  # before the checkpoint, in the middle of an epoch
LAYOUTS = [(1, 1), (2, 2), (4, 2), (4, 4)]  # ranks, ranks that share out the experts


def train_to(update: int, ranks: int, size: int, folder: Path, *flags: object) -> list[Run]:
    """The same global batches whatever the number of ranks."""
    layout = ("--update-freq", 4 // ranks, "--moe-expert-parallel-size", size, "--ddp-backend", "legacy_ddp")
    saving = ("--save-interval-updates", UPDATES, "--save-dir", folder, "--disable-validation")
    return train(ranks, *flags, *layout, *saving, "--max-update", update)


@pytest.fixture(scope="session")
def written(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run of 2 updates with a given layout, and the one process that did 4 in a row."""

    @cache
    def write(ranks: int, size: int, *more: str, updates: int = UPDATES) -> tuple[Path, list[Run]]:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}-size{size}")
        return folder, train_to(updates, ranks, size, folder, corpus[0], *MT, *EXACT, *more)

    return write


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "before, after",
    [((4, 4), (1, 1)), ((4, 2), (2, 2)), ((1, 1), (4, 2))],
)
def test_any_layout_continues_any_other(
    before: tuple[int, int], after: tuple[int, int], written: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    assert_continues(written(*before)[0] / "checkpoint_last.pt", after, written, corpus, tmp_path)


def assert_continues(
    checkpoint: Path, after: tuple[int, int], written: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    straight = written(1, 1, updates=4)[1][0]
    flags = (corpus[0], *MT, *EXACT, "--restore-file", checkpoint)
    runs = train_to(4, *after, tmp_path, *flags)
    expected = {
        **straight,
        "gradients": straight["gradients"][UPDATES:],
        "norms": straight["norms"][UPDATES:],
    }
    assert_same_training(runs, {**expected, "logs": straight["logs"][UPDATES:]}, after[1])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_the_file_is_what_one_process_writes(layout: tuple[int, int], written: Any) -> None:
    """Names, shapes, weights, optimizer state, scheduler, place in the data; nothing tells of ranks."""
    got, expected = (load(written(*which)[0] / "checkpoint_last.pt") for which in (layout, (1, 1)))
    assert got.keys() == expected.keys()
    assert list(got["model"]) == list(expected["model"])
    used = [name for name in expected["model"] if not UNUSED.search(name)]
    assert_same(*({name: state["model"][name] for name in used} for state in (got, expected)), what="weight")
    slots, expected_slots = (state["last_optimizer_state"]["state"] for state in (got, expected))
    trained = [index for index, slot in expected_slots.items() if slot["step"]]
    for moment in ("exp_avg", "exp_avg_sq"):
        mine, theirs = ({i: state[i][moment] for i in trained} for state in (slots, expected_slots))
        assert_same(mine, theirs, what=moment)
    assert got["optimizer_history"] == expected["optimizer_history"]
    assert got["cfg"]["model"]["moe_expert_parallel_size"] == 1


def test_averaged_weights_are_gathered_too(written: Any) -> None:
    got, expected = (
        load(written(*layout, "--store-ema", "--ema-decay", "0.9")[0] / "checkpoint_last.pt")
        for layout in ((2, 2), (1, 1))
    )
    used = [name for name in expected["model"] if not UNUSED.search(name)]
    averages = ({name: state["extra_state"]["ema"][name] for name in used} for state in (got, expected))
    assert_same(*averages, what="average")


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


def tool(*arguments: object) -> tuple[int, str]:
    """Exit status and output of xmoe-checkpoint."""
    with patch("sys.argv", ["xmoe-checkpoint", *map(str, arguments)]), StringIO() as text:
        with redirect_stdout(text), redirect_stderr(text):
            try:
                main()
            except SystemExit as end:
                return int(end.code or 0), text.getvalue()
        return 0, text.getvalue()


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
        said = [line for line in printed.splitlines() if not line.startswith(("usage:", " "))]
        assert len(said) == 1
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
