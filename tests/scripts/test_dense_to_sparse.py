"""dense_to_sparse.sh: from binarised text to a table of conversions and their scores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
from commands import script

from experiments import evaluation, score_conversions
from xmoe_fairseq_compat.errors import UserError

SMALLER = [
    f"--{side}-{size}"
    for side in ("encoder", "decoder")
    for size in ("layers=1", "embed-dim=16", "ffn-embed-dim=64")
]


@pytest.mark.parametrize("task", ["lm", "mt"])
def test_trains_converts_and_scores(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data, out = request.getfixturevalue(f"{task}_data"), tmp_path / "out"
    said = script(
        "dense_to_sparse.sh", task, data, out, *(SMALLER if task == "mt" else SMALLER[3:]), "--max-update", 3,
        SPLIT="8", GROUPINGS="random", FINETUNE="1",
    )  # fmt: skip
    assert "| random | 8 | one for all layers | 1 updates of all |" in said
    scores = json.loads((out / "scores" / "scores.json").read_text())
    assert list(scores) == ["dense", "random-0", "random-1"]
    assert {*scores["dense"]} == ({"test perplexity"} if task == "lm" else {"test bleu", "test chrf"})
    if task == "lm":  # 3 updates are next to nothing: about as many as there are words to choose from
        assert all(1 < found["test perplexity"] < 500 for found in scores.values())


PRINTED = "Evaluated 90 tokens\nLoss (base 2): 2.0000, Perplexity: 4.00\n"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The stock commands that are called; each prints PRINTED, or nothing evaluated for a wide context."""
    called: list[list[str]] = []

    def call(words: list[str], stdout: TextIO, **_: object) -> SimpleNamespace:
        called.append(words)
        stdout.write(PRINTED.replace("90", "0" if "1024" in words else "90"))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(evaluation, "subprocess", SimpleNamespace(run=call, STDOUT=subprocess.STDOUT))
    return called


def score(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["score_conversions", *map(str, words)])
    score_conversions.main()


def test_scores_again_only_what_has_changed(
    commands: list[list[str]], lm_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = tmp_path / "sparse.pt", ("--out", tmp_path / "out")
    checkpoint.touch()
    for _ in range(2):
        score(monkeypatch, "lm", lm_data, checkpoint, *out)
    assert len(commands) == 1
    assert json.loads((tmp_path / "out/scores.json").read_text()) == {"sparse": {"test perplexity": 4.0}}
    score(monkeypatch, "lm", lm_data, checkpoint, *out, "--context", 64)
    assert len(commands) == 2
    later = checkpoint.stat().st_mtime + 60
    os.utime(checkpoint, (later, later))
    score(monkeypatch, "lm", lm_data, checkpoint, *out, "--context", 64)
    assert len(commands) == 3


def test_what_cannot_be_scored(
    commands: list[list[str]], lm_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sparse.pt").touch()
    one, other, out = tmp_path / "a/sparse.pt", tmp_path / "b/sparse.pt", ("--out", tmp_path / "out")
    for words, message in (
        (("lm", tmp_path, one, *out), "DATA must hold bin/test"),
        (("lm", lm_data, tmp_path / "none.pt", *out), "none.pt: No such file"),
        (("lm", lm_data, one, other, *out), "two checkpoints are called sparse"),
        (("lm", lm_data, one, *out, "--context", 1024), "nothing was evaluated"),
    ):
        with pytest.raises(UserError) as ended:
            score(monkeypatch, *words)
        assert message in str(ended.value) and "\n" not in str(ended.value)
        assert not (tmp_path / "out/scores.json").exists()
