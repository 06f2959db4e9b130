"""apt-get in a private folder: indexes, versions and packages, with nothing installed and no root.

The sources are those that the system is set up for; their signatures and every package's checksum are
verified by apt as always.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from textio import DataError

TOOLS = ("apt-get", "apt-cache", "dpkg-deb")


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    source: str  # the source package it is built from
    sha256: str
    bytes: int


class Apt:
    def __init__(self, folder: Path, languages: list[str]) -> None:
        for tool in TOOLS:
            if shutil.which(tool) is None:
                raise DataError(f"{tool} not found; the packages corpora need a Debian or Ubuntu system")
        self.lists = folder / "lists"
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        options = {
            "Dir::State": folder,
            "Dir::State::Status": folder / "status",  # nothing is installed: only what is offered counts
            "Dir::State::Lists": self.lists,
            "Dir::Cache": folder / "cache",
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "Dir::Cache::srcpkgcache": "srcpkgcache.bin",
            "Acquire::Languages": ",".join(languages),
            "Acquire::GzipIndexes": "false",  # plain text, so that it can be read here
            "Acquire::Retries": 3,
            "APT::Update::Error-Mode": "any",  # otherwise an index that fails is only a warning
            "APT::Sandbox::User": "root",  # root too downloads as itself: the folder may be private
        }
        self._options = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]

    def update(self, again: bool = False) -> None:
        """Get the indexes; kept until asked again, so that a resumed run sees the same versions."""
        done = self.lists / ".complete"
        if done.exists() and not again:
            return
        self._run("apt-get", "-qq", "update", what="cannot get the package indexes")
        done.touch()

    def find(self, names: list[str]) -> dict[str, Package]:
        """Those of the names that the sources offer, in the version apt would install."""
        done = self._start("apt-cache", "show", "--no-all-versions", *names)  # 100 if none is there
        found = {}
        for stanza in done.stdout.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line)
            if "SHA256" in fields and (name := fields["Package"]) not in found:
                found[name] = Package(
                    name=name,
                    version=fields["Version"],
                    source=fields.get("Source", name).split(" ")[0],
                    sha256=fields["SHA256"],
                    bytes=int(fields["Size"]),
                )
        return found

    def unpack(self, package: Package, folder: Path) -> None:
        """Download a package and unpack it into a folder that appears when it is whole."""
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        what = f"cannot download {package.name} {package.version}"
        self._run(
            "apt-get", "-qq", "download", f"{package.name}={package.version}", what=what, folder=partial
        )
        (deb,) = partial.glob("*.deb")
        tree = partial / "tree"
        self._run("dpkg-deb", "-x", str(deb), str(tree), what=f"cannot unpack {package.name}", own=False)
        tree.replace(folder)
        shutil.rmtree(partial)

    def _run(
        self, *words: str, what: str, folder: Path | None = None, own: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = self._start(*words, folder=folder, own=own)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg", "tar:"))]
            reason = (lines or done.stderr.splitlines() or ["no reason given"])[0].removeprefix("E: ")
            raise DataError(f"{what}: {reason}")
        return done

    def _start(
        self, *words: str, folder: Path | None = None, own: bool = True
    ) -> subprocess.CompletedProcess[str]:
        tool, *arguments = words
        command = [tool, *self._options, *arguments] if own else list(words)
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        return subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
