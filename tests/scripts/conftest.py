"""Corpora as data-prep leaves them."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # experiments and benchmarks


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
