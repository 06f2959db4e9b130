"""What a user can fix. A program catches an ordinary exception; a command ends with its one line."""

from __future__ import annotations

import os
import re
from typing import Any


def flag(name: str) -> str:
    """A setting as on the command line."""
    return "--" + name.replace("_", "-")


# What ast.literal_eval raises, by what is wrong with a text.
NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


class UserError(Exception):
    """Its text is one line: which flag or file, the rule, the value, and where it helps what to do."""


class FlagError(UserError, ValueError):
    """A setting that breaks a rule."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used."""

    def __init__(self, file: Any, problem: str) -> None:
        name = file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", file)
        super().__init__(f"cannot load checkpoint {name}: {problem}")


def one_line(error: BaseException) -> str | None:
    """What a command that ends with this error has to say; None where only a traceback helps.

    Beside the errors above these are a user's to fix: a file that cannot be opened, a package to install, a
    setting that is missing, and what fairseq itself checks of its flags (assert, ValueError; it names them).
    """
    text = str(error)
    if isinstance(error, (UserError, FloatingPointError)):
        return text
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if type(error).__name__ == "MissingMandatoryValue":  # omegaconf's
        return f"{flag(str(vars(error)['full_key']).rpartition('.')[2])} must be given"
    if not text or "\n" in text:
        return None
    if isinstance(error, OSError) and error.errno is None:  # in fairseq's own words
        return text if " " in text else f"{text}: {type(error).__name__}"
    if isinstance(error, ImportError) and re.search("[Pp]lease install|pip install", text):
        return text
    names_it = re.fullmatch(r"(.* )?--[a-z][a-z-]+\b.*|.* does not exist", text)
    return text if names_it and isinstance(error, (AssertionError, ValueError)) else None
