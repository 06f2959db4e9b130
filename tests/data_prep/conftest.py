from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for prep_scripts.py

from prep_scripts import PREP, Scripts

sys.path.append(str(PREP))  # its modules, for tests of single functions


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For the shell scripts: the interpreter that runs the tests."""
    return {**os.environ, "VENV": sys.prefix}
