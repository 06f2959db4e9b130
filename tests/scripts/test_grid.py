"""grid.py: which runs, in which order, and what becomes of one that fails."""

import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import grid
from xmoe_fairseq_compat.errors import UserError


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(model, seed, core) of each run; those of switch fail."""
    calls: list[tuple[str, int, int]] = []

    def train_and_score(
        _: str, __: str, model: str, seed: int, ___: Path, run: Path, core: int, splits: list[str]
    ) -> bool:
        assert splits == ["test"]
        calls.append((model, seed, core))
        run.mkdir()
        (run / "scores.best.json").write_text("{}")
        return model != "switch"

    monkeypatch.setattr(grid, "train_and_score", train_and_score)
    monkeypatch.setattr(grid.os, "sched_getaffinity", lambda _: {5})
    return calls


def start(monkeypatch: pytest.MonkeyPatch, *words: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["grid", *map(str, words)])
    return grid.main()


def test_first_seeds_first_and_nothing_twice(
    tmp_path: Path, called: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/dict.txt").touch()
    models = ("--models", "dense", "xmoe-s4 --moe-threshold 0.8", "--seeds", 1, 2)
    for _ in range(2):
        start(monkeypatch, "lm", "claims", tmp_path, tmp_path / "out", *models)
    assert called == [
        ("dense", 1, 5), ("xmoe-s4 --moe-threshold 0.8", 1, 5),
        ("dense", 2, 5), ("xmoe-s4 --moe-threshold 0.8", 2, 5),
    ]  # fmt: skip
    assert (tmp_path / "out/xmoe-s4-moe-threshold-0.8-2").is_dir()


def test_a_failure_is_named_at_the_end(
    tmp_path: Path, called: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/dict.txt").touch()
    models = ("--models", "switch", "dense", "--seeds", 1)
    with pytest.raises(UserError, match="1 runs failed: switch-1; the same command tries again"):
        start(monkeypatch, "lm", "claims", tmp_path, tmp_path / "out", *models)
    assert len(called) == 2


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="MODEL must be one of dense"):
        start(monkeypatch, "lm", "claims", tmp_path, tmp_path / "out", "--models", "best")
    with pytest.raises(UserError, match="DATA must be a folder of data-prep with bin/ in it"):
        start(monkeypatch, "lm", "claims", tmp_path, tmp_path / "out", "--models", "dense")
    assert not (tmp_path / "out").exists()
