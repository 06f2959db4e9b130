"""The native kernel's library: when it is compiled, and what is said where it cannot be."""

import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from xmoe_fairseq.moe import native
from xmoe_fairseq.moe.native import build as native_build
from xmoe_fairseq.moe.native.build import BuildError, build, library_name


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the sources, so that they can be changed; nothing compiled."""
    folder = tmp_path / "native"
    shutil.copytree(native_build.HERE, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(native_build, "HERE", folder)
    return folder


@pytest.mark.parametrize("changed", ["experts.cpp", "shares.h", "version.py"])
def test_another_source_or_torch_wants_another_library(
    changed: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(native_build.torch_folder() / "version.py", tmp_path)
    before = library_name()
    monkeypatch.setattr(native_build, "torch_folder", lambda: tmp_path)
    assert library_name() == before
    path = tmp_path / changed if changed == "version.py" else copy / changed
    path.write_text(path.read_text() + "\n")
    assert library_name() != before


def test_two_at_a_time_compile_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_library(folder: Path) -> Path:
        compiled.append(folder)
        time.sleep(0.2)
        made = folder / "experts.so"
        made.touch()
        return made

    monkeypatch.setattr(native_build, "compile_library", compile_library)
    old = copy / f"{library_name().rsplit('-', 1)[0]}-0.so"  # of the same torch
    of_another_torch = copy / "experts-0-0.so"
    old.touch()
    of_another_torch.touch()
    with ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(lambda _: build(copy), range(2)))
    assert said[0] == "the native kernel is up to date" and "was built in" in said[1]
    assert len(compiled) == 1
    assert {path.name for path in copy.glob("*.so")} == {library_name(), of_another_torch.name}


def test_no_compiler(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"^no C\+\+ compiler 'no-such-compiler'; install one \(.*g\+\+\)$"):
        build(copy)
    assert not list(copy.glob("*.so"))


def test_a_compiler_that_fails_is_quoted_in_one_line(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in copy.glob("*.cpp"):
        source.write_text('#error "these headers are too old"\n')
    with pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(native_build, "build", lambda: build(copy))
        native_build.main()
    assert "these headers are too old" in str(stopped.value) and "\n" not in str(stopped.value)
    assert not [path for path in copy.iterdir() if path.is_dir()]  # no scratch folder


def test_without_a_library_the_log_says_what_to_run(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "HERE", copy)
    with caplog.at_level(logging.WARNING, logger=native.logger.name):
        assert native.missing.__wrapped__() == "it has not been compiled for this torch"
    (record,) = caplog.records
    assert record.getMessage() == (
        "no native kernel, experts take longer on the CPU: it has not been compiled for this torch; "
        "run: python -m xmoe_fairseq.moe.native"
    )


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit"])
def test_a_damaged_library_is_not_loaded_and_made_anew(
    damage: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading one that was cut short ends the process with a bus error."""
    library = copy / native_build.library_name()
    whole = (native.HERE / library.name).read_bytes()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    library.write_bytes({"cut": whole[:20000], "empty": b"", "one bit": flipped}[damage])
    monkeypatch.setattr(native, "HERE", copy)
    assert native.missing.__wrapped__() == f"{library} is damaged"

    def compile_library(folder: Path) -> Path:
        (folder / "made.so").write_bytes(whole[:-4])
        return folder / "made.so"

    monkeypatch.setattr(native_build, "compile_library", compile_library)
    assert "was built" in build(copy) and library.read_bytes() == whole
    assert build(copy) == "the native kernel is up to date"
