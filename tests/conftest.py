import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests share reference.py, toy.py and commands.py

from commands import write_corpus


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    import torch  # not above: each pytest-xdist controller would import it for nothing

    torch.set_num_threads(1)
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Binarised folders for translation and for language modelling."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
