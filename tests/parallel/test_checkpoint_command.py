"""xmoe-checkpoint and averaging on checkpoints that are damaged, packed or incomplete, and on a full disk."""

import copy
import os
import resource
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from distributed import run_ranks
from toy import language_model

from xmoe_fairseq.parallel import checkpoint_command
from xmoe_fairseq.parallel.shards import remove_orphans
from xmoe_fairseq_compat import folder_lock
from xmoe_fairseq_compat.errors import CheckpointError, FlagError, UserError
from xmoe_fairseq_compat.files import WriteError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from experiments import average_checkpoints  # noqa: E402

State = dict[str, Any]


def state() -> State:
    """What fairseq-train writes of a model whose layers 1 and 3 have experts."""
    model = language_model(decoder_layers=4)
    history = {"num_updates": 2, "criterion_name": "x", "optimizer_name": "y", "lr_scheduler_state": {}}
    return {
        "args": None, "cfg": {"model": {"_name": "xmoe_transformer_lm"}}, "model": model.state_dict(),
        "optimizer_history": [history], "extra_state": {}, "last_optimizer_state": None,
    }  # fmt: skip


def saved(state: State, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return saved(state(), tmp_path / "whole.pt")


def test_a_packed_checkpoint_is_read_right(whole: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(whole) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for part in plain.namelist():
            target.writestr(part, plain.read(part))
    assert packed.stat().st_size < whole.stat().st_size
    checkpoint_command.convert(packed, tmp_path / "shards.pt", 2)
    checkpoint_command.convert(tmp_path / "shards.pt", tmp_path / "again.pt", 1)
    expected, got = (torch.load(path)["model"] for path in (whole, tmp_path / "again.pt"))
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_activated_parameters_are_told(tmp_path: Path) -> None:
    of = state()
    of["cfg"]["model"].update(moe_router="topk", moe_topk=3)
    _, text = call(checkpoint_command.main, "xmoe-checkpoint", "info", saved(of, tmp_path / "checkpoint.pt"))
    total, experts = sum(v.numel() for v in of["model"].values()), 2 * 8 * (2 * 32 * 24 + 24 + 32)
    shared, one = total - experts, experts // 8
    says = f"{shared + 3 * one:,} ({shared:,} shared + 3 x {one:,}), of {total:,}"
    assert f"parameters: {total:,}, of these in experts {experts:,}" in text
    assert f"\nactivated parameters per token: {says}\n" in text
    assert "experts per token in" not in text
    logged = [("tokens", 10.0), ("rows_kept_E", [9.0, 12.0]), ("rows_shared", 10.0)]
    meters = [(10, f"_moe_decoder_{name}", "SumMeter", {"sum": torch.tensor(v)}) for name, v in logged]
    for group, where in (("train", "training, since its epoch began"), ("valid", "the last validation")):
        of["extra_state"].setdefault("metrics", {})[group] = meters
        _, text = call(
            checkpoint_command.main, "xmoe-checkpoint", "info", saved(of, tmp_path / f"{group}.pt")
        )
        assert f"\nexperts per token in {where}: decoder 3.10\n" in text
    of["extra_state"]["metrics"] = {"train": meters[:1], "valid": [3]}
    of["cfg"]["model"].update(moe_topk="three")
    _, text = call(checkpoint_command.main, "xmoe-checkpoint", "info", saved(of, tmp_path / "damaged.pt"))
    says = f"{shared:,} shared + experts per token x {one:,}, of {total:,}"
    assert f"\nactivated parameters per token: {says}\n" in text and "experts per token in" not in text


EXPERTS = "decoder.layers.1.moe.experts.fc1_weight"
NORM = "decoder.layers.2.final_layer_norm.weight"


def without(name: str) -> Callable[[State], Any]:
    return lambda state: state["model"].pop(name)


def given(name: str, value: Any) -> Callable[[State], Any]:
    return lambda state: state["model"].update({name: value})


def no_number(state: State) -> None:
    state["model"][NORM][0] = float("inf")


@pytest.mark.parametrize(
    "change, problem",
    [
        (without(NORM), "decoder.layers.2 has no final_layer_norm.weight, which decoder.layers.0 has"),
        (without(EXPERTS), "decoder.layers.1 has no moe.experts.fc1_weight, which decoder.layers.3 has"),
        (
            given("decoder.layers.0.stray", torch.ones(1)),
            "decoder.layers.2 has no stray, which decoder.layers.0 has",
        ),
        (no_number, f"{NORM} holds NaN or inf"),
        (given(NORM, "text"), f"{NORM} is no tensor"),
        (given(NORM, None), f"{NORM} is missing"),
        (lambda state: state.update(model=True), "its entry 'model' is 'True'"),
    ],
)
def test_what_is_missing_stray_or_no_number_is_named(
    change: Callable[[State], Any], problem: str, whole: Path, tmp_path: Path
) -> None:
    damaged = state()
    change(damaged)
    path = saved(damaged, tmp_path / "damaged.pt")
    for act in (
        lambda: checkpoint_command.convert(path, tmp_path / "new.pt", 1),
        lambda: checkpoint_command.convert(path, tmp_path / "new.pt", 2),
        lambda: average_checkpoints.average([whole, path]),
    ):
        with pytest.raises(CheckpointError, match=f"cannot load checkpoint {path}: {problem}"):
            act()
    assert sorted(os.listdir(tmp_path)) == ["damaged.pt", "whole.pt"]


def test_an_optimizer_s_state_that_is_none(tmp_path: Path) -> None:
    path = saved({**state(), "last_optimizer_state": {"state": {0: 5}}}, tmp_path / "damaged.pt")
    with pytest.raises(UserError, match="the optimizer's state is damaged"):
        checkpoint_command.convert(path, tmp_path / "new.pt", 2)


def test_layers_that_all_lack_a_part_of_the_experts(tmp_path: Path) -> None:
    damaged = state()
    for layer in (1, 3):
        del damaged["model"][f"decoder.layers.{layer}.moe.experts.fc2_bias"]
    path = saved(damaged, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError, match=r"decoder.layers.\d has no moe.experts.fc2_bias"):
        checkpoint_command.convert(path, tmp_path / "new.pt", 1)


def test_the_mean_of_checkpoints_with_other_settings_is_refused(tmp_path: Path) -> None:
    first, second = state(), state()
    for one, t in ((first, 0.5), (second, 0.9)):
        one["cfg"]["model"] |= {"moe_router": "threshold", "moe_threshold": t}
    paths = [saved(one, tmp_path / f"{i}.pt") for i, one in enumerate((first, second))]
    line = f"{paths[1]}: it has --moe-threshold 0.9, and {paths[0]} has --moe-threshold 0.5"
    with pytest.raises(CheckpointError, match=line):
        average_checkpoints.average(paths)
    assert average_checkpoints.average(paths[:1])["model"].keys() == first["model"].keys()


@pytest.mark.parametrize(
    "entry", [{}, "x", 5, {"id": "a", "files": []}, {"id": "a", "files": [5]}, {"files": ["experts/a.pt"]},
              {"id": "a", "files": ["../a.pt"]}, {"id": "a", "files": ["experts/../../a.pt"]}],
)  # fmt: skip
def test_a_damaged_list_of_files(entry: Any, tmp_path: Path) -> None:
    path = saved({**state(), "expert_shards": entry}, tmp_path / "checkpoint.pt")
    for words in (("info", path), ("merge", path, tmp_path / "new.pt")):
        (line,) = call(checkpoint_command.main, "xmoe-checkpoint", *words)[1].splitlines()
        assert f"cannot load checkpoint {path}: its entry 'expert_shards' is damaged" in line


def test_one_line_for_bad_words(whole: Path, tmp_path: Path) -> None:
    for words, message in (
        (("info", tmp_path), f"xmoe-checkpoint: error: {tmp_path}: Is a directory"),
        (
            ("info", tmp_path / "none.pt"),
            f"xmoe-checkpoint: error: {tmp_path}/none.pt: No such file or directory",
        ),
        (("shard", whole, tmp_path / "new.pt"), "xmoe-checkpoint shard: error: the following arguments are"),
        (("merges", whole), "xmoe-checkpoint: error: argument command: there is no 'merges'"),
    ):
        status, said = call(checkpoint_command.main, "xmoe-checkpoint", *words)
        assert status and said.startswith(message) and said.count("\n") == 1


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda experts: experts["model"].pop(EXPERTS), f"has no {EXPERTS}"),
        (lambda experts: experts["model"].update(stray=torch.ones(2)), "has besides stray"),
        (lambda experts: experts.update(stray={"a": 1}), "has besides a in stray"),
        (lambda experts: experts.update(model=5), "it holds no experts"),
        (given(EXPERTS, "text"), f"{EXPERTS} (is no tensor|in model is of another kind)"),
        (given(EXPERTS, torch.ones(2)), f"{EXPERTS} in model is of another kind or size"),
    ],
)
def test_a_file_of_experts_that_holds_something_else(
    change: Callable[[State], Any], problem: str, whole: Path, tmp_path: Path
) -> None:
    checkpoint_command.convert(whole, tmp_path / "shards.pt", 2)
    for file in (tmp_path / "experts").iterdir():
        good = torch.load(file)
        damaged = copy.deepcopy(good)
        change(damaged["experts"])
        torch.save(damaged, file)
        with pytest.raises(CheckpointError, match=problem):
            checkpoint_command.convert(tmp_path / "shards.pt", tmp_path / "new.pt", 1)
        torch.save(good, file)


@pytest.mark.parametrize("act", ["merge", "shard", "average"])
def test_a_full_disk_leaves_nothing(act: str, whole: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"

    def write() -> str:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
        with pytest.raises(WriteError) as error:
            if act == "average":
                average_checkpoints.write_average([whole], new / "checkpoint.pt")
            else:
                checkpoint_command.convert(whole, new / "checkpoint.pt", 1 if act == "merge" else 2)
        return str(error.value)

    (said,) = run_ranks(1, write)
    assert said.startswith(f"cannot write {new}/") and said.endswith(": file too large")
    assert not [path for path in new.rglob("*") if path.is_file()]


def test_a_copy_under_any_name_keeps_its_experts(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint_command.convert(whole, run / "checkpoint_last.pt", 2)
    os.rename(run / "checkpoint_last.pt", run / "checkpoint_last.pt.bak")
    (run / "train.log").write_text("no checkpoint")
    with zipfile.ZipFile(run / "code.zip", "w") as archive:
        archive.writestr("code/data.pkl", b"no pickle")
    remove_orphans(run)
    assert len(list((run / "experts").iterdir())) == 2
    (run / "checkpoint_last.pt.bak").unlink()
    remove_orphans(run)
    assert not list((run / "experts").iterdir())


def test_a_clean_up_does_not_let_go_of_the_folder(whole: Path, tmp_path: Path) -> None:
    """The system's lock ends where any file handle on it is closed in the process that holds it."""
    lock = folder_lock.hold(str(tmp_path))
    remove_orphans(tmp_path)

    def other() -> str:
        with pytest.raises(FlagError) as error:
            folder_lock.hold(str(tmp_path))
        return str(error.value)

    assert f"in use by process {os.getpid()}" in run_ranks(1, other)[0]
    lock.release()
