"""The scripts are run as a user runs them: in their own process, on small files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Fails = Callable[..., str]

PREP = Path(__file__).parents[2] / "data-prep"
NEEDS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="downloads need curl")

PREPROCESS = """#!/usr/bin/env bash
# Stands in for fairseq-preprocess, which takes seconds to import: files under the right names.
languages=("") pair=""
while [ $# -gt 0 ]; do
  case $1 in
    --destdir) dest=$2;; --srcdict) dict=$2;;
    --source-lang) languages=(."$2");; --target-lang) languages+=(."$2") pair=${languages[0]}-$2;;
    --trainpref) splits=train;; --validpref) splits+=" valid";;
    --testpref) n=""; for t in ${2//,/ }; do splits+=" test$n"; n=$((n + 1)); done;;
  esac
  shift
done
mkdir -p "$dest"
for language in "${languages[@]}"; do
  cp "$dict" "$dest/dict$language.txt"
  for split in $splits; do for kind in bin idx; do cp "$dict" "$dest/$split$pair$language.$kind"; done; done
done
"""


def prepare(
    script: str, *args: object, prep: Path = PREP, **environment: str
) -> subprocess.CompletedProcess[str]:
    """prepare_SCRIPT.sh of data-prep, or of a copy, with these variables alone."""
    command = ["bash", str(prep / f"prepare_{script}.sh"), *map(str, args)]
    return subprocess.run(command, text=True, env=environment, capture_output=True, check=False)


class Scripts:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, *lines: str) -> Path:
        path = self.folder / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    def run(self, name: str, *args: object) -> str:
        """The counts line that the script printed."""
        done = self.start(name, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fails(self, name: str, *args: object) -> str:
        """The one line that the script gave for its failure."""
        before = sorted(self.folder.iterdir())
        done = self.start(name, *args)
        assert done.returncode not in (0, -9)
        assert sorted(self.folder.iterdir()) == before, "something half-written was left"
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    def start(self, name: str, *args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(PREP / name), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)
