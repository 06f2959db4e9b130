"""What a user can mend. A program catches an ordinary exception; a command ends with its one line."""

from __future__ import annotations

import os
from typing import Any


class UserError(Exception):
    """Its text is one line: which flag or file, the rule, the value, and where it helps what to do."""


class FlagError(UserError, ValueError):
    """A setting that breaks a rule."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used."""

    def __init__(self, file: Any, problem: str) -> None:
        name = file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", file)
        super().__init__(f"cannot load checkpoint {name}: {problem}")
