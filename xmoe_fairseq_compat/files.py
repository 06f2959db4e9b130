"""Files that are whole or not there, and errors that every rank hears of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from xmoe_fairseq_compat.errors import UserError

# For `checkpoints.load`: tensors are mapped if they can be, so that those nobody asks for are not read.
MAPPED: dict[str, Any] = {"map_location": "cpu", "mmap": True}


class WriteError(UserError, OSError):
    """A file that could not be written."""

    def __init__(self, path: Any, reason: str) -> None:
        super().__init__(f"cannot write {path}: {reason[:1].lower()}{reason[1:]}")


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write to a temporary file beside `path` and rename it: at no moment is there a part of the file.

    Args:
        write: gets the temporary file, open for bytes.

    Raises:
        WriteError: the path and the reason, such as "no space left on device"; the temporary file is gone.
    """
    temporary = f"{path}.tmp"
    make_folder(os.path.dirname(temporary) or ".")
    with named_in_errors(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
            os.replace(temporary, path)
        finally:
            if os.path.lexists(temporary):
                os.unlink(temporary)


def make_folder(folder: str | Path) -> None:
    """Raises WriteError."""
    with named_in_errors(folder):
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError:
            raise WriteError(folder, "it is a file, not a folder") from None


@contextmanager
def named_in_errors(path: str | Path) -> Iterator[None]:
    """In this block the system's errors become a WriteError that names `path`."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
            cause = cause.__cause__ or cause.__context__  # torch.save hides it behind a RuntimeError
        if cause is None or isinstance(cause, ConnectionError):
            raise
        raise WriteError(path, str(cause.strerror)) from error


def from_all_ranks(value: Any) -> list[Any]:
    """What each rank gives. A collective; in one process its own value alone."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(error: UserError | None) -> None:
    """A collective: what is wrong on one rank is raised on all, so that none waits for another in vain."""
    raise_told(error, from_all_ranks(str(error) if error else None))


def raise_told(error: UserError | None, told: list[str | None]) -> None:
    """Raise this rank's error, else that of the first rank which told one."""
    if error:
        raise error
    for rank, text in enumerate(told):
        if text:
            raise UserError(f"{text} (said by rank {rank})")
