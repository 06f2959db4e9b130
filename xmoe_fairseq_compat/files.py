"""Files that are whole or not there, and errors that every rank hears of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from xmoe_fairseq_compat.errors import UserError

# For `checkpoints.load`: tensors are mapped if they can be, so that those nobody asks for are not read.
MAPPED: dict[str, Any] = {"map_location": "cpu", "mmap": True}


class WriteError(UserError, OSError):
    """A file that could not be written."""

    def __init__(self, path: Any, reason: str) -> None:
        super().__init__(f"cannot write {path}: {reason[:1].lower()}{reason[1:]}")


def temporary_of(path: str | Path) -> str:
    """Beside it, and always the same: the next run overwrites what a killed one left."""
    return f"{path}.tmp"  # as fairseq's own


def write_atomically(path: str | Path, content: str | Callable[[IO[bytes]], Any]) -> None:
    """At no moment is there a part of the file; its folder is made.

    Args:
        content: text, or what writes to the temporary file, open for bytes.

    Raises:
        WriteError: the path and the reason, such as "no space left on device"; the temporary file is gone.
    """
    make_folder(os.path.dirname(path) or ".")
    with named_in_errors(path), atomic_files([path]) as (file,):
        if isinstance(content, str):
            file.write(content.encode())
        else:
            content(file)


@contextmanager
def atomic_files(paths: Sequence[str | Path]) -> Iterator[list[IO[bytes]]]:
    """Files that get their names only when the block ends without an exception, the first of them last.

    Those of an earlier run go before: a kill in between leaves the set incomplete, never of two runs.
    """
    temporaries = [temporary_of(path) for path in paths]
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(open(temporary, "wb")) for temporary in temporaries]
        for path in paths[:-1]:
            with suppress(FileNotFoundError):
                os.unlink(path)
        for temporary, path in reversed([*zip(temporaries, paths, strict=True)]):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            with suppress(OSError):  # what stopped us says more
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
