"""Runs that several tests look at."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from parallel_checkpoints import UPDATES, train_to
from parallel_runs import (
    EXACT,
    MT,
    Run,
)


@pytest.fixture(scope="session")
def written(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run of 2 updates with a given layout, and the one process that did 4 in a row."""

    @cache
    def write(ranks: int, size: int, *more: str, updates: int = UPDATES) -> tuple[Path, list[Run]]:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}-size{size}")
        return folder, train_to(updates, ranks, size, folder, corpus[0], *MT, *EXACT, *more)

    return write
