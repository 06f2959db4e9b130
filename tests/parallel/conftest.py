from pathlib import Path

import pytest
from commands import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Binarised folders for translation and for language modelling."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
