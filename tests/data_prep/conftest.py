from __future__ import annotations

import importlib
import os
import stat
import sys
from pathlib import Path

import pytest
from commands import for_shells
from forks import tools

sys.path.insert(0, str(Path(__file__).parent))  # for prep_scripts.py and stand_ins.py

from prep_scripts import PREP, PREPROCESS, Fails, Scripts

sys.path.append(str(PREP))  # its modules, for tests of single functions


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return {**os.environ, **for_shells(), "WORKERS": "1"}


@pytest.fixture
def stubbed(tmp_path: Path, environment: dict[str, str]) -> dict[str, str]:
    """An environment whose fairseq-preprocess is instant."""
    own = tmp_path / "venv" / "bin"
    own.mkdir(parents=True)
    for name, text in (
        ("fairseq-preprocess", PREPROCESS),
        ("python", f'#!/usr/bin/env bash\nexec "{tools() / "python"}" "$@"\n'),
    ):
        (own / name).write_text(text)
        (own / name).chmod(stat.S_IRWXU)
    return {**environment, "VENV": str(own.parent)}


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fails:
    """The one line with which a command ends; nothing has changed, and nothing is left."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).write_text("text\n")

    def run(name: str, *arguments: object) -> str:
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        command = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            importlib.import_module("textio").run(command.main)
        message = str(end.value.code)
        assert message.startswith(f"{name}.py: error: ") and "\n" not in message
        assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
        return message

    return run
