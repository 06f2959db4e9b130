"""fetch_packages.py, with apt itself and a repository in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from debian import Repository, needs_apt
from prep_scripts import Scripts

pytestmark = needs_apt
COPYRIGHT = b"License: GPL-2+ or MIT\n\nLicense: CC-BY-SA-3.0\n"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    repository = Repository(tmp_path / "repository")
    repository.add("foo", {"usr/share/doc/foo/copyright": COPYRIGHT, "usr/text": b"1"}, source="foo-source")
    repository.add("foo-data", {"usr/text": b"2"}, version="2:1.5-1", source="foo-source")
    repository.add("bar-de", {"usr/share/doc/bar-de/copyright": b"See /usr/share/common-licenses/GPL-3.\n"})
    for name, value in repository.publish({"en": "", "de": ""}).items():
        monkeypatch.setenv(name, value)
    return repository


LIST = [
    "# a comment",
    "",
    "core * foo",
    "core de,ru old-name|bar-{lang}",
    "core uk nothing",
    "full * foo-data",
]
OPTIONS = ["--list", "list", "--task", "mt", "--folder", "packages", "--sources-out", "sources.json"]


def sources(scripts: Scripts) -> list[dict[str, str]]:
    return json.loads((scripts.folder / "sources.json").read_text("utf-8"))


def test_packages_are_unpacked_once_and_described(scripts: Scripts, repository: Repository) -> None:
    scripts.write("list", *LIST)
    printed = scripts.run("fetch_packages.py", *OPTIONS, "--tiers", "core", "full", "--lang", "de")
    assert "1/3 foo_1.0, 0.0 MB" in printed and "packages 3, downloaded 3" in printed
    folder = scripts.folder / "packages"
    assert (folder / "foo_1.0" / "usr" / "text").read_text() == "1"
    assert (folder / "foo-data_2:1.5-1" / "usr" / "text").read_text() == "2"
    assert not list(folder.glob("*.partial")) and not list(folder.rglob("*.deb"))
    entries = {entry["name"]: entry for entry in sources(scripts)}
    assert list(entries) == ["foo", "bar-de", "foo-data", "descriptions"]
    licence = "CC-BY-SA-3.0, GPL-2+, MIT"
    assert [e["licence"] for e in entries.values()][:3] == [
        licence,
        "GPL-3",
        licence,
    ]  # of the sister package
    package = (repository.folder / "pool" / "foo-data.deb").read_bytes()
    assert entries["foo-data"]["sha256"] == hashlib.sha256(package).hexdigest()
    assert entries["foo-data"]["version"] == "2:1.5-1" and entries["foo-data"]["source"] == "foo-source"

    # Again: nothing is fetched, not even the indexes, and what was written stays as it was.
    before = (scripts.folder / "sources.json").stat().st_mtime_ns
    shutil.rmtree(repository.folder / "pool")
    printed = scripts.run("fetch_packages.py", *OPTIONS, "--tiers", "core", "full", "--lang", "de")
    assert "packages 3, downloaded 0" in printed
    assert (scripts.folder / "sources.json").stat().st_mtime_ns == before


def test_a_killed_download_is_done_again(scripts: Scripts, repository: Repository) -> None:
    scripts.write("list", "core foo")
    left = scripts.folder / "packages" / "foo_1.0.partial" / "tree"
    left.mkdir(parents=True)
    (left / "half").touch()
    assert "downloaded 1" in scripts.run("fetch_packages.py", *OPTIONS, "--tiers", "core")
    assert os.listdir(scripts.folder / "packages" / "foo_1.0") == ["usr"]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["core * foo", "core * gone|lost"], ["--lang", "de"], "list:2: the system's package sources have"),
        (["core * foo"], ["--lang", "fr"], "--lang must be one of de, ru, uk, he, zh, got 'fr'"),
        (["full foo"], [], "no package for --tiers core"),
        (["core * foo"], ["--lang", "de", "--without", "foo"], "no package for --tiers core"),
        (["core"], [], "list:1: 1 columns"),
    ],
)  # fmt: skip
def test_errors(
    scripts: Scripts, repository: Repository, lines: list[str], options: list[str], message: str
) -> None:
    scripts.write("list", *lines)
    done = scripts.start("fetch_packages.py", *OPTIONS, "--tiers", "core", *options)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (scripts.folder / "sources.json").exists()
    assert not list((scripts.folder / "packages").glob("foo*"))


def test_a_failing_download_or_a_wrong_checksum_is_one_line(scripts: Scripts, repository: Repository) -> None:
    scripts.write("list", "core foo")
    package = repository.folder / "pool" / "foo.deb"
    package.write_bytes(package.read_bytes()[:-1] + b"x")
    done = scripts.start("fetch_packages.py", *OPTIONS, "--tiers", "core")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "cannot download foo 1.0" in done.stderr and "ash" in done.stderr  # Hash Sum mismatch
    package.unlink()
    done = scripts.start("fetch_packages.py", *OPTIONS, "--tiers", "core")
    assert done.returncode == 1 and "cannot download foo 1.0" in done.stderr
    assert not (scripts.folder / "packages" / "foo_1.0").exists()
    (repository.folder / "sources.list").write_text(f"deb file:{scripts.folder}/nowhere test main\n")
    done = scripts.start("fetch_packages.py", *OPTIONS, "--tiers", "core", "--refresh")
    assert done.returncode == 1 and "cannot get the package indexes: " in done.stderr


def test_without_apt_one_line(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts.write("list", "core foo")
    monkeypatch.setenv("PATH", str(scripts.folder))
    done = scripts.start("fetch_packages.py", *OPTIONS, "--tiers", "core")
    assert "apt-get not found; the packages corpora need a Debian or Ubuntu system" in done.stderr
