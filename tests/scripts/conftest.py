"""Corpora as data-prep leaves them."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
from commands import run as command


@pytest.fixture(scope="module")
def mt_data(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces in bin/, each a whole word, and text in text/."""
    folder = tmp_path_factory.mktemp("mt")
    shutil.copytree(corpus[0], folder / "bin")
    for path in (folder / "bin").glob("dict.*.txt"):
        path.write_text("".join(f"▁{line}\n" for line in path.read_text().splitlines()))
    (folder / "text").mkdir()
    for split in ("valid", "test"):
        for language in ("en", "de"):
            shutil.copy(corpus[0].parent / f"{split}.{language}", folder / "text")
    return folder


@pytest.fixture(scope="module")
def lm_data(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    shutil.copytree(corpus[1], folder / "bin")
    (folder / "text").mkdir()
    for split in ("valid", "test"):
        shutil.copy(corpus[1].parent / f"{split}.en", folder / "text" / f"docs.{split}")
    return folder


@pytest.fixture
def with_forks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a tool's main in this process, and the stock commands that it starts in forks."""
    from experiments import evaluation, train

    def call(words: list[str], stdout: TextIO, **_: object) -> int:
        stdout.write(command(Path(words[0]).name, *words[1:]))
        return 0

    def run_logged(words: list[str], log: Path) -> int:
        log.write_text(command(Path(words[0]).name, *words[1:]))
        return 0

    monkeypatch.setattr(evaluation, "processes", SimpleNamespace(run=call))
    monkeypatch.setattr(train, "run_logged", run_logged)

    def run(main: Callable[[], None], *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        main()

    return run
