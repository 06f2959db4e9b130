"""A Debian repository in a folder, with real packages, and apt told to use it instead of the system's."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

needs_apt = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("apt-get", "apt-cache", "dpkg-deb")),
    reason="apt and dpkg are needed",
)


class Repository:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stanzas: list[str] = []
        self.index = folder / "dists" / "test" / "main"
        self.architecture = subprocess.run(
            ["dpkg", "--print-architecture"], capture_output=True, text=True, check=True
        ).stdout.strip()

    def add(self, name: str, files: dict[str, bytes], version: str = "1.0", source: str = "") -> None:
        tree = self.folder / "build" / name
        fields = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: Nobody <a@b.c>\n"
        fields += f"Source: {source}\n" if source else ""
        for path, data in {"DEBIAN/control": f"{fields}Description: {name}\n".encode(), **files}.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(data)
        package = self.folder / "pool" / f"{name}.deb"
        package.parent.mkdir(exist_ok=True)
        build = ["dpkg-deb", "--root-owner-group", "-Znone", "-b", str(tree), str(package)]
        subprocess.run(build, check=True, capture_output=True)
        data = package.read_bytes()
        place = f"Filename: pool/{name}.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
        self.stanzas.append(f"{fields}Description: {name}\n{place}")

    def publish(self, descriptions: dict[str, str]) -> dict[str, str]:
        """Write the indexes ({language: Translation file}); the environment in which apt sees only them."""
        files = {f"binary-{self.architecture}/Packages": "\n".join(self.stanzas) + "\n"}
        files.update({f"i18n/Translation-{language}": text for language, text in descriptions.items()})
        release = "Origin: test\nSuite: test\nCodename: test\nComponents: main\n"
        release += f"Architectures: {self.architecture}\nSHA256:\n"
        for name, text in files.items():
            (self.index / name).parent.mkdir(parents=True, exist_ok=True)
            (self.index / name).write_text(text, encoding="utf-8")
            release += f" {hashlib.sha256(text.encode()).hexdigest()} {len(text.encode())} main/{name}\n"
        (self.index.parent / "Release").write_text(release)
        (self.folder / "sources.list").write_text(f"deb [trusted=yes] file:{self.folder} test main\n")
        configuration = self.folder / "apt.conf"
        configuration.write_text(
            f'Dir::Etc::SourceList "{self.folder}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
            'Dir::Etc::Parts "/dev/null";\n'
        )
        return {**os.environ, "APT_CONFIG": str(configuration)}
