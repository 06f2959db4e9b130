"""Every way to install the package puts the start-up line of xmoe_fairseq_compat in place."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

from xmoe_fairseq.moe.native.build import library_name

REPO = Path(__file__).parents[2]
PTH = "xmoe_fairseq_compat.pth"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a build leaves folders in the source tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(REPO / name, copy)
    for name in ("xmoe_fairseq", "xmoe_fairseq_compat"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(source: Path, folder: Path, kind: str) -> zipfile.ZipFile:
    """The wheel that pip would build, without the network that pip's isolated build needs."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    output = subprocess.check_output(
        [sys.executable, "-c", code], cwd=source, text=True, stderr=subprocess.PIPE
    )
    return zipfile.ZipFile(folder / output.splitlines()[-1])


def run_start_up_line(line: str, path: Path) -> str:
    code = f"import sys; sys.path.insert(0, {str(path)!r}); exec({line!r})\n"
    code += "print('xmoe_fairseq_compat' in sys.modules)"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert result.stderr == ""
    return result.stdout.strip()


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_start_up_line_is_installed(kind: str, source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path, kind)
    line = wheel.read(PTH).decode()
    assert line.startswith("import ") and line.count("\n") == 1, "site runs only lines that begin with import"
    assert f"{PTH}," in wheel.read(next(n for n in wheel.namelist() if n.endswith("/RECORD"))).decode()
    assert run_start_up_line(line, source) == "True"
    assert run_start_up_line(line, tmp_path) == "False", "silent where the package was removed"
    for file in ("xmoe_fairseq/moe/layer.py", "xmoe_fairseq_compat/registry.py"):
        assert (file in wheel.namelist()) == (kind == "wheel")


def test_a_wheel_has_the_native_kernel_and_its_source(
    native_library: None, source: Path, tmp_path: Path
) -> None:
    wheel = build(source, tmp_path, "wheel")
    folder = "xmoe_fairseq/moe/native"
    names = {f"{folder}/{name}" for name in ("experts.cpp", "experts.h", library_name())}
    assert names <= {*wheel.namelist()}
    assert not wheel.filename.endswith("-any.whl")


def test_metadata(source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path, "wheel")
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode()
    assert "Requires-Dist: torch>=" in metadata and "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: fairseq" not in metadata, "pip would refuse fairseq's own dependencies"
    assert not [name for name in wheel.namelist() if name.startswith("tests")]


def test_every_dependency_has_a_tested_version() -> None:
    pinned = {line.split("==")[0].lower() for line in (REPO / "constraints.txt").read_text().splitlines()}
    names = {re.match(r"[\w.-]+", need)[0].lower() for need in requires("xmoe_fairseq")}
    assert names and names <= pinned
