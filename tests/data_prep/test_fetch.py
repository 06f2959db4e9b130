"""fetch and unpack of steps.sh, against a server on 127.0.0.1."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from prep_scripts import NEEDS_CURL, PREP
from stand_ins import Files, serve

pytestmark = NEEDS_CURL

BODY = bytes(range(256)) * 4000


def shell(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; . "{PREP}/steps.sh"; {command}'],
        cwd=folder,
        env={**os.environ, "FETCH_RETRIES": "0", **environment},
        text=True,
        capture_output=True,
        check=False,
    )


def fails(folder: Path, command: str, **environment: str) -> str:
    done = shell(folder, command, **environment)
    assert done.returncode != 0 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("left", [0, 1000, len(BODY)], ids=["nothing", "a part", "all but the rename"])
def test_what_an_interrupted_call_left_is_taken_up(tmp_path: Path, left: int) -> None:
    with serve(Files, {"/a.tgz": BODY}, cut=left) as (url, handler):
        if left:
            shell(tmp_path, f"fetch {url}/a.tgz got/a.tgz")
            assert [path.stat().st_size for path in (tmp_path / "got").iterdir()] == [left]
        handler.cut = None
        done = shell(tmp_path, f"fetch {url}/a.tgz got/a.tgz")
        assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["a.tgz"]
    assert (tmp_path / "got" / "a.tgz").read_bytes() == BODY


def test_a_short_file_keeps_its_temporary_name(tmp_path: Path) -> None:
    with serve(Files, {"/a.tgz": BODY}, cut=1000) as (url, _):
        message = fails(tmp_path, f"fetch {url}/a.tgz a.tgz")
        assert message.startswith(f"cannot fetch {url}/a.tgz: curl: (18)")
    assert not (tmp_path / "a.tgz").exists()


def test_what_came_from_elsewhere_is_not_taken_up(tmp_path: Path) -> None:
    with serve(Files, {"/old.tgz": b"x" * 5000, "/new.tgz": BODY}, cut=1000) as (url, handler):
        fails(tmp_path, f"fetch {url}/old.tgz a.tgz")
        handler.cut = None
        assert shell(tmp_path, f"fetch {url}/new.tgz a.tgz").returncode == 0
    assert (tmp_path / "a.tgz").read_bytes() == BODY


def test_failures_are_one_line(tmp_path: Path) -> None:
    with serve(Files, {"/empty": b""}) as (url, _):
        assert "the file there is empty" in fails(tmp_path, f"fetch {url}/empty a")
        assert "error: 404" in fails(tmp_path, f"fetch {url}/none a")
    assert "curl: (7)" in fails(tmp_path, f"fetch {url}/gone a")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cksum", "cut", "getconf", "mkdir", "dirname"):
        (tools / name).symlink_to(shutil.which(name) or "")
    assert "curl not found; install it" in fails(tmp_path, "fetch http://127.0.0.1/a a", PATH=str(tools))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tools"]


def test_unpack(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for lang in ("en", "de"):
            entry = tarfile.TarInfo(f"training/x.de-en.{lang}")
            entry.size = 500_000
            archive.addfile(entry, io.BytesIO(os.urandom(500_000)))
    (tmp_path / "whole.tgz").write_bytes(packed.getvalue())
    (tmp_path / "short.tgz").write_bytes(packed.getvalue()[:600_000])
    before = sorted(path.name for path in tmp_path.iterdir())
    members = "training/x.de-en.{en,de}"
    for archive, member in (("short", members), ("whole", "none.{en,de}")):
        message = fails(tmp_path, f"unpack {archive}.tgz x {member}")
        assert message.startswith(f"{archive}.tgz: cannot unpack") and "delete it" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert shell(tmp_path, f"unpack whole.tgz x {members}").returncode == 0
    assert (tmp_path / "x.en").stat().st_size == (tmp_path / "x.de").stat().st_size == 500_000
