"""Saving and going on with real runs: what cannot be right is refused, in one line, on every rank."""

import os
import re
import resource
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import TINY_LM
from distributed import run_ranks
from parallel_runs import EXACT, LM, MT, fairseq_train

from xmoe_fairseq_compat.errors import UserError

SHORT = (*EXACT, "--disable-validation", "--max-update")
DENSE = tuple(word for word in TINY_LM[2:] if "moe" not in str(word))


def said(ranks: int, *flags: object, folder: Path, each_its_own: bool = False) -> list[str]:
    """What each rank ends with; "" if it trains."""

    def rank() -> str:
        sys.argv = ["fairseq-train", *map(str, flags)]
        own = folder / str(dist.get_rank()) if each_its_own else folder
        try:
            fairseq_train(*flags, "--save-dir", own)
        except UserError as error:
            return str(error)
        return ""

    lines = run_ranks(ranks, rank)
    assert not any("\n" in line for line in lines)
    return lines


@pytest.fixture(scope="session")
def trained(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trained(flags ...) -> the checkpoint of a language model after two updates."""

    @cache
    def train(*flags: object) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        assert said(1, corpus[1], *LM, *SHORT, 2, *flags, folder=folder) == [""]
        return folder / "checkpoint_last.pt"

    return train


@pytest.fixture
def saved(trained: Any, tmp_path: Path) -> Any:
    """saved(flags ...) -> a folder with a copy of that checkpoint as its last."""

    def copy(*flags: object) -> Path:
        shutil.copy(trained(*flags), tmp_path)
        return tmp_path

    return copy


def test_a_checkpoint_that_is_not_there_is_refused_on_all_ranks(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = (corpus[1], *LM, *SHORT, 1, "--restore-file", tmp_path / "typo.pt")
    assert said(2, *flags, folder=tmp_path) == [f"--restore-file: there is no file {tmp_path}/typo.pt"] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, line",
    [
        (
            ("--decoder-embed-dim", 64, "--decoder-layers", 4),
            r"its weights do not fit the model: decoder.embed_tokens.weight is \[\d+, 32\], not \[\d+, 64\], "
            r".* and \d+ more; it has no decoder.layers.2.*--decoder-embed-dim 32, here 64.*",
        ),
        (
            ("--criterion", "cross_entropy"),
            "it was trained with the criterion MoECrossEntropyCriterion, this run has CrossEntropyCriterion; "
            "add --reset-optimizer",
        ),
        (
            ("--bf16",),
            "it was trained with the optimizer FairseqAdam, this run has FP16Optimizer; add --reset-",
        ),
        (
            ("--lr-scheduler", "inverse_sqrt"),
            "it was trained with --lr-scheduler fixed, this run has inverse_sqrt; add --reset-lr-scheduler",
        ),
        (
            (
                "--moe-router",
                "topk",
                "--moe-topk",
                1,
                "--lr-scheduler",
                "inverse_sqrt",
                "--reset-lr-scheduler",
            ),
            "",
        ),
    ],
    ids=["sizes", "criterion", "optimizer", "scheduler", "what was typed"],
)
def test_one_line_where_a_run_goes_on_otherwise(
    flags: tuple[object, ...], line: str, saved: Any, corpus: tuple[Path, Path]
) -> None:
    """say_why_a_checkpoint_does_not_fit"""
    folder = saved()
    (got,) = said(1, corpus[1], *LM, *SHORT, 3, *flags, folder=folder)
    if line:
        assert re.match(f"cannot load checkpoint {folder}/checkpoint_last.pt: {line}", got), got
    else:
        assert got == ""


def test_settings_that_a_command_line_leaves_out_are_not_changed_silently(
    trained: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    weights = ("--moe-combine", "normalized", "--moe-output-scale", 2.0)
    source = trained("--moe-threshold", 0.586, "--activation-fn", "gelu", *weights)
    lacks_activation = said(1, corpus[1], *LM, *SHORT, 1, "--restore-file", source, folder=tmp_path)
    assert "add --activation-fn gelu to keep them, or --activation-fn relu to" in lacks_activation[0]
    flags = (corpus[1], *LM, *SHORT, 1, "--activation-fn", "gelu", "--finetune-from-model", source)
    keep, change = (
        f"--moe-combine {combine} --moe-output-scale {scale} {experts}"
        for combine, scale, experts in (
            ("normalized", 2.0, "--moe-threshold 0.586 --moe-threshold-rule mass"),
            ("probs", 1.0, "--moe-target-experts-per-token 1.0 --moe-threshold-rule probability"),
        )
    )
    assert said(2, *flags, folder=tmp_path)[0] == (
        f"cannot load checkpoint {source}: it was trained or converted with other settings than this run's, "
        f"which its weights do not show; add {keep} to keep them, or {change} to change them"
    )
    for given in (keep, change):
        assert said(1, *flags, *given.split(), folder=tmp_path) == [""]
        (tmp_path / "checkpoint_last.pt").unlink()


def test_a_dense_checkpoint_is_sent_to_the_converter(
    trained: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    dense = trained("--moe-freq", 0, "--decoder-embed-dim", 16)
    (got,) = said(1, corpus[1], *LM, *SHORT, 1, "--finetune-from-model", dense, folder=tmp_path)
    assert re.match(
        f"cannot load checkpoint {dense}: it is dense, and this model has experts .*--decoder-embed-dim 16, "
        f"here 32.*; make it sparse first, by xmoe-convert {dense} moe.pt --upcycle 4 --split 2 --moe-freq",
        got,
    )


SHARDED = ("--moe-expert-parallel-size", 2, "--ddp-backend", "legacy_ddp", "--moe-sharded-checkpoints")


@pytest.mark.parametrize("when", ["at the start", "at the first checkpoint"])
def test_shards_in_folders_that_the_ranks_do_not_share(
    when: str, corpus: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "at the first checkpoint":
        monkeypatch.setattr("xmoe_fairseq_compat.folder_lock.NAME", "../seen-by-all")
    lines = said(2, corpus[0], *MT, *SHORT, 2, *SHARDED, folder=tmp_path, each_its_own=True)
    assert all("--moe-sharded-checkpoints: rank " in line for line in lines), lines
    assert all("all ranks must share that folder" in line for line in lines)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_checkpoint_that_one_rank_does_not_see(
    saved: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    """look_at_a_checkpoint_first"""
    (tmp_path / "0").mkdir()
    shutil.move(saved() / "checkpoint_last.pt", tmp_path / "0")
    lines = said(2, corpus[1], *LM, *SHORT, 3, folder=tmp_path, each_its_own=True)
    assert all(
        "rank 0 sees it and rank 1 does not; all ranks must share its folder" in line for line in lines
    )


@pytest.mark.parametrize("form", [(), SHARDED], ids=["gathered", "sharded"])
def test_a_full_disk_is_said_on_all_ranks(
    form: tuple[object, ...], corpus: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rank 1 if it writes."""
    plain_save = torch.save

    def save(obj: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if hasattr(file, "name") and dist.get_rank() == (1 if form else 0):
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
        try:
            plain_save(obj, file, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)

    monkeypatch.setattr(torch, "save", save)
    lines = said(2, corpus[0], *MT, *SHORT, 2, *form, folder=tmp_path)
    assert all(line.startswith(f"cannot write {tmp_path}/") for line in lines), lines
    assert all("file too large" in line for line in lines)
    assert {*os.listdir(tmp_path)} <= {"experts", "config.yaml"}  # the latter is written before training


def test_two_runs_in_one_folder(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    from xmoe_fairseq_compat import folder_lock

    lock = folder_lock.hold(str(tmp_path))
    lines = said(2, corpus[1], *LM, *SHORT, 1, folder=tmp_path)
    lock.release()
    assert all(f"--save-dir {tmp_path} is in use by process {os.getpid()}" in line for line in lines)
