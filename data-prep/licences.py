"""The licences of an unpacked Debian package, from its debian/copyright file."""

from __future__ import annotations

import re
from pathlib import Path

SHORT_NAME = re.compile(r"^License:[ \t]*(\S.*)$", re.M)
COMMON = re.compile(r"/usr/share/common-licenses/([\w.+-]*\w)")


def licences(root: Path, package: str) -> str:
    """Names, sorted; empty if the file is not there or names none.

    Machine-readable files say `License: NAME`; others point to the system's own texts.
    """
    path = root / "usr/share/doc" / package / "copyright"
    if not path.is_file():
        return ""
    text = path.read_text("utf-8", "replace")
    names = {
        name.strip() for line in SHORT_NAME.findall(text) for name in re.split(r"\s+(?:and|or)\s+|,", line)
    }
    names = {name for name in names if name} or set(COMMON.findall(text))
    return ", ".join(sorted(names))
