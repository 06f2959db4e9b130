"""The package as it is installed: the start-up line of xmoe_fairseq_compat is in place, all files are there,
it works from any folder beside stock fairseq, and goes without a trace."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest
from commands import BIN, DEADLINE, REPO, TINY_LM, TRAIN

from xmoe_fairseq.moe.native.build import HERE, library_name

PTH = "xmoe_fairseq_compat.pth"
NATIVE = "xmoe_fairseq/moe/native"
DATA = {f"{NATIVE}/experts.cpp", f"{NATIVE}/experts.h", "xmoe_fairseq/explain/page.html"}
FORWARD = (
    "import logging, torch; logging.basicConfig(); from xmoe_fairseq.moe import MoELayer, ThresholdRouter;"
    "from xmoe_fairseq.moe.native import missing;"
    "MoELayer(8, 4, 6, ThresholdRouter(8, 6))(torch.randn(2, 8)); print(repr(missing()))"
)


def succeed(*command: object, **options: object) -> str:
    """What it printed."""
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=DEADLINE, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: a build leaves folders in the source tree."""
    copy = tmp_path_factory.mktemp("source")
    (copy / "tests").mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "tests/test_layout.py"):
        shutil.copy(REPO / name, copy / name)
    for name in ("xmoe_fairseq", "xmoe_fairseq_compat"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """With the native kernel, where there is one."""
    return build(source, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tarfile.TarFile, zipfile.ZipFile]:
    """By `python -m build`, which makes the wheel of the sdist; without a compiler."""
    folder = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    succeed(*command, env=os.environ | {"CXX": "no-such-compiler"})
    return tarfile.open(next(folder.glob("*.tar.gz"))), zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., str]:
    """Runs a command of a new environment, from a folder of its own. In it are the packages that are here,
    stock fairseq among them, but not this one."""
    succeed(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"(__editable__\.)?xmoe_fairseq", package.name):
            (site / package.name).symlink_to(package)
    for name in ("fairseq-train", "fairseq-eval-lm"):
        script = (BIN / name).read_text().split("\n", 1)[1]
        (tmp_path / "env/bin" / name).write_text(f"#!{tmp_path}/env/bin/python\n{script}")
        (tmp_path / "env/bin" / name).chmod(0o755)
    (tmp_path / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(name: str, *arguments: object) -> str:
        return succeed(tmp_path / "env/bin" / name, *arguments, cwd=tmp_path / "elsewhere", env=environment)

    return run


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
def test_start_up_line_is_installed(kind: str, source: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    made = wheel if kind == "wheel" else build(source, tmp_path, kind)
    line = made.read(PTH).decode()
    assert line.startswith("import ") and line.count("\n") == 1, "site runs only lines that begin with import"
    assert f"{PTH}," in made.read(next(n for n in made.namelist() if n.endswith("/RECORD"))).decode()
    assert run_start_up_line(line, source) == "True"
    assert run_start_up_line(line, tmp_path) == "False", "silent where the package was removed"
    for file in ("xmoe_fairseq/moe/layer.py", "xmoe_fairseq_compat/registry.py", *DATA):
        assert (file in made.namelist()) == (kind == "wheel")


def test_a_wheel_has_the_native_kernel(native_library: None, wheel: zipfile.ZipFile) -> None:
    assert f"{NATIVE}/{library_name()}" in wheel.namelist()
    assert not wheel.filename.endswith("-any.whl")


def test_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode()
    assert "Requires-Dist: torch>=" in metadata and "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: fairseq" not in metadata, "pip would refuse fairseq's own dependencies"


def test_what_is_built_of_the_sdist_has_all_files(
    built: tuple[tarfile.TarFile, zipfile.ZipFile], wheel: zipfile.ZipFile
) -> None:
    sdist, of_sdist = built
    names = {name.partition("/")[2] for name in sdist.getnames()}
    packages = {str(path.relative_to(REPO)) for path in REPO.glob("xmoe_fairseq*/**/*.py")}
    assert packages | DATA | {"setup.py", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".so")]
    assert {*of_sdist.namelist()} == {name for name in wheel.namelist() if not name.endswith(".so")}


def test_installed_beside_stock_fairseq(
    fresh: Callable[..., str], wheel: zipfile.ZipFile, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    before = {*(tmp_path / "env").rglob("*")}
    fresh("python", "-m", "pip", "install", "--no-index", "--no-deps", wheel.filename)
    by_name = ("--user-dir", "xmoe_fairseq", *TINY_LM[2:])
    log = fresh("fairseq-train", corpus[1], *by_name, *TRAIN, "--max-update", "2", "--save-dir", "run")
    assert "done training" in log
    assert "2 updates, xmoe_transformer_lm_tiny" in fresh("xmoe-checkpoint", "info", "run/checkpoint_last.pt")
    assert ("no native kernel" not in log) == (HERE / library_name()).exists()
    fresh("python", "-m", "pip", "uninstall", "--yes", "xmoe_fairseq")
    assert {*(tmp_path / "env").rglob("*")} == before


def test_a_kernel_that_is_compiled_later_goes_too(
    native_library: None,
    fresh: Callable[..., str],
    built: tuple[tarfile.TarFile, zipfile.ZipFile],
    tmp_path: Path,
) -> None:
    before = {*(tmp_path / "env").rglob("*")}
    fresh("python", "-m", "pip", "install", "--no-index", "--no-deps", built[1].filename)
    notice = "it has not been compiled for this torch; run: python -m xmoe_fairseq.moe.native\n"
    assert notice in fresh("python", "-c", FORWARD)
    folder = next((tmp_path / "env").rglob(NATIVE))
    shutil.copy(HERE / library_name(), folder)  # which compiling would take half a minute for
    for _ in range(2):
        assert fresh("python", "-m", "xmoe_fairseq.moe.native") == "the native kernel is up to date\n"
    assert fresh("python", "-c", FORWARD) == "''\n"
    record = next((tmp_path / "env").rglob("xmoe_fairseq-*/RECORD")).read_text()
    assert record.count(library_name()) == 1
    fresh("python", "-m", "pip", "uninstall", "--yes", "xmoe_fairseq")
    assert {*(tmp_path / "env").rglob("*")} == before


def test_every_dependency_has_a_tested_version() -> None:
    pinned = {line.split("==")[0].lower() for line in (REPO / "constraints.txt").read_text().splitlines()}
    names = {re.match(r"[\w.-]+", need)[0].lower() for need in requires("xmoe_fairseq")}
    assert names and names <= pinned
