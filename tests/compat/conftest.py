from pathlib import Path

import pytest
from commands import run
from stock import LANGUAGE, TRANSLATION


@pytest.fixture(scope="session")
def stock_models(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """fairseq's own models, for translation and for language modelling, after a few updates."""
    folders = [tmp_path_factory.mktemp(name) for name in ("translation", "language")]
    for data, flags, folder in zip(corpus, (TRANSLATION, LANGUAGE), folders, strict=True):
        run("fairseq-train", data, *flags, "--save-dir", folder)
    return folders[0] / "checkpoint_last.pt", folders[1] / "checkpoint_last.pt"
