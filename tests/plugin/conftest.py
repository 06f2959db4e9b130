from pathlib import Path

import pytest
from commands import TINY_LM, TINY_MT, TRAIN, run


@pytest.fixture(scope="session")
def translation_checkpoint(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translation")
    run(
        "fairseq-train", corpus[0], *TINY_MT, *TRAIN, "--max-update", 30, "--lr", "5e-3",
        "--moe-threshold", 0.9, "--save-dir", folder,
    )  # fmt: skip
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def language_checkpoint(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    run(
        "fairseq-train", corpus[1], *TINY_LM, *TRAIN, "--max-update", 12, "--moe-threshold", 0.9,
        "--save-dir", folder,
    )  # fmt: skip
    return folder / "checkpoint_last.pt"
