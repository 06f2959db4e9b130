"""The native kernel's library: when it is compiled, and what is said where it cannot be."""

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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

    monkeypatch.setattr(native_build, "compiler", lambda: ["g++"])
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


@pytest.mark.parametrize(
    ("variable", "command"),
    [(None, ["g++"]), ("", ["g++"]), ("sh -c 'a b'", ["sh", "-c", "a b"])],
    ids=["not set", "empty", "with arguments"],
)
def test_the_compiler_may_have_arguments(
    variable: str | None, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.delenv("CXX", raising=False)
    if variable is not None:
        monkeypatch.setenv("CXX", variable)
    assert native_build.compiler() == command


def test_another_system(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build.sys, "platform", "win32")
    with pytest.raises(BuildError, match=r"^the native kernel is for Linux, and this is win32$"):
        build(copy)


def test_a_folder_that_takes_no_files_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "compiler", lambda: ["g++"])
    with pytest.raises(
        BuildError, match=r"^cannot write to .*/none \(No such file or directory\); run it as"
    ):
        build(copy / "none")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a shell script the compiler."""
    path = tmp_path / "compiler"
    path.touch(0o755)
    monkeypatch.setenv("CXX", f"{path} --argument")
    return lambda script: path.write_text(f"#!/bin/sh\n{script}\n") and None


def test_what_a_build_that_was_killed_has_left_is_removed(
    copy: Path, stand_in: Callable[[str], None]
) -> None:
    """Kills it where it runs the compiler, and then lets the compiler fail."""
    before = {path.name for path in copy.iterdir()}

    def leaves(script: str) -> set[str]:
        stand_in(script)
        done = subprocess.run([sys.executable, "-B", str(copy / "build.py")], capture_output=True)
        assert done.returncode, done.stdout
        return {path.name for path in copy.iterdir()} - before

    (left,) = leaves("kill -9 $PPID")
    assert left.startswith(native_build.SCRATCH)
    assert not leaves("exit 1")


def test_a_compiler_that_fails_is_quoted_in_one_line(
    copy: Path, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("echo 'In file included from a.h:' >&2; echo 'b.h:3: error: it is too old' >&2; exit 1")
    monkeypatch.setattr(native_build, "build", lambda: build(copy))
    with pytest.raises(SystemExit) as stopped:
        native_build.main()
    assert str(stopped.value).endswith("compiler failed: b.h:3: error: it is too old")
    assert str(stopped.value).startswith("the native kernel was not built: ")


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
    damage: str, native_library: None, copy: Path, monkeypatch: pytest.MonkeyPatch
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
