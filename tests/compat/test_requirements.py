"""What a missing or wrong package says: one line with the command that fixes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xmoe_fairseq import _requirements as requirements

REPO = Path(requirements.__file__).parents[1]


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "2.14.0a0+git1", "3.0"])
def test_torch_that_will_do(version: str) -> None:
    assert requirements.version_problem("torch", version) is None


@pytest.mark.parametrize(
    ("version", "found"), [(None, "none"), ("2.5.1", "2.5.1"), ("1.13.1+cu117", "1.13.1+cu117")]
)
def test_torch_that_will_not_do(version: str | None, found: str) -> None:
    problem = requirements.version_problem("torch", version)
    expected = (
        f'xmoe_fairseq needs torch 2.6 or later, found {found}; run: python -m pip install "torch>=2.6"'
    )
    assert problem == expected


def test_fairseq() -> None:
    assert requirements.version_problem("fairseq", "0.12.2") is None
    command = "python -m pip install --no-deps fairseq==0.12.2"
    for version, found in (
        (None, "none"),
        ("0.10.2", "0.10.2"),
        ("0.12.3", "0.12.3"),
        ("1.0.0a0", "1.0.0a0"),
    ):
        problem = requirements.version_problem("fairseq", version)
        assert problem == f"xmoe_fairseq needs fairseq 0.12.2, found {found}; run: {command}"


def test_sentencepiece() -> None:
    assert requirements.version_problem("sentencepiece", "0.2.3") is None
    for version in (None, "0.1.99"):
        assert 'python -m pip install "sentencepiece>=0.2"' in str(
            requirements.version_problem("sentencepiece", version)
        )


def test_command_for_patches_that_came_too_late(tmp_path: Path) -> None:
    assert requirements.compat_problem(True, tmp_path) is None
    installed = str(requirements.compat_problem(False, tmp_path))
    assert installed.endswith("run: python -m pip install --no-deps --force-reinstall xmoe_fairseq")
    (tmp_path / "setup.py").touch()
    checkout = str(requirements.compat_problem(False, tmp_path))
    assert checkout.endswith(f'run: python -m pip install --no-deps -e "{tmp_path}"')


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.5.1"), ("fairseq", None), ("sentencepiece", None), ("sentencepiece", "0.1.9")],
)
def test_check_raises_one_line(package: str, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements.check_requirements()
    found = requirements.installed_version
    monkeypatch.setattr(requirements, "installed_version", lambda p: version if p == package else found(p))
    with pytest.raises(
        ImportError, match=f"^xmoe_fairseq needs {package} .* run: python -m pip install [^\n]*$"
    ):
        requirements.check_requirements()


def python_without_start_up_line(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as where the plugin's parent is on PYTHONPATH only: -S leaves out all .pth files."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    return subprocess.run(
        # site gives Python its `help`, which fairseq needs
        [sys.executable, "-S", "-c", "import builtins; builtins.help = None\n" + code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *packages])},
        capture_output=True,
        text=True,
    )


def test_import_without_start_up_line() -> None:
    result = python_without_start_up_line("import xmoe_fairseq, fairseq; print('fine')")
    assert result.stdout == "fine\n", result.stderr


def test_import_too_late() -> None:
    late = "import sys, types; sys.modules['fairseq'] = types.ModuleType('fairseq')\nimport xmoe_fairseq"
    result = python_without_start_up_line(late)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.endswith(f"RequirementError: {requirements.compat_problem(False, REPO)}")
