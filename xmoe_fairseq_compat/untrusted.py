"""What fairseq does with text, files and archives that may come from anybody: nothing of them is run."""

from __future__ import annotations

import ast
import lzma
import operator
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xmoe_fairseq_compat.errors import NO_LITERAL, FlagError, UserError
from xmoe_fairseq_compat.reading import MOST_TIMES
from xmoe_fairseq_compat.registry import EVERY, patch, patch_around, stand_in, wrap

LONGEST = 10**6  # of a list that is written as a product: a choice, far above any model's layers


def literal(text: Any) -> Any:
    """What fairseq evaluates: literals, their sums and products, as in `[(512, 3)] * 20 + [(1024, 3)]`.

    What is no text is a value already, which a checkpoint may hold: tasks put `True` where "True" was.

    Raises:
        FlagError: it is anything else.
    """
    operators: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def value(node: ast.AST) -> Any:
        if not (isinstance(node, ast.BinOp) and type(node.op) in operators):
            return ast.literal_eval(node)
        left, right = value(node.left), value(node.right)
        if isinstance(node.op, ast.Mult) and _length(left, right) > LONGEST:
            raise ValueError("too long")
        return operators[type(node.op)](left, right)

    if not isinstance(text, str):
        return text
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except NO_LITERAL as error:
        rule = "a setting must be written out, as in (0.9, 0.98) or {'dropout': 0.1}"
        raise FlagError(f"{rule}, got {' '.join(text.split())[:200]}") from error


def _length(left: Any, right: Any) -> int:
    """Of the list that a product makes; 0 for one of numbers."""
    if hasattr(left, "__len__"):
        return len(left) * abs(int(right))
    return len(right) * abs(int(left)) if hasattr(right, "__len__") else 0


@patch_around(EVERY)
def evaluate_literals_only(module: Any) -> Iterator[None]:
    """Every torch: fairseq calls eval on strings of a model's configuration, which a checkpoint brings along,
    and of the command line. A name in the module hides the builtin."""
    module.eval = literal
    yield


@patch_around(EVERY)
def load_weights_only(module: Any) -> Iterator[None]:
    """Every torch: fairseq leaves it to torch's default what torch.load may run; an environment variable, or
    torch < 2.6, makes that anything."""
    yield
    import torch

    file = getattr(module, "__file__", None)
    if getattr(module, "torch", None) is torch and file and b"torch.load(" in Path(file).read_bytes():
        from xmoe_fairseq_compat.checkpoints import load

        module.torch = stand_in(torch, load=load)


def fasta_index(path: str) -> tuple[Any, Any]:
    """Where the entries of a FASTA file begin, in bytes, and their sequences' lengths: two (N,) of int64."""
    import numpy as np

    starts, sizes, here = list[int](), list[int](), 0
    with open(path, "rb") as lines:
        for line in lines:
            if line.startswith(b">"):
                starts.append(here)
                sizes.append(0)
            elif sizes:
                sizes[-1] += len(line.strip())
            here += len(line)
    return np.array(starts, dtype=np.int64), np.array(sizes, dtype=np.int64)


@patch("fairseq.data.fasta_dataset")
def read_fasta_without_a_shell(module: Any) -> None:
    """Every torch: --dataset-impl fasta puts the file's name into a shell command, where $(...) is run."""
    module.FastaDataset._build_index = lambda self, path: fasta_index(module.fasta_file_path(path))


def unpack(archive: str) -> str:
    """The folder that holds what is in a tar file, from which nothing leads out. It is made once, beside it.

    Raises:
        UserError: it is no such archive, or one that is meant to harm.
    """
    folder = Path(f"{archive}.{os.stat(archive).st_mtime_ns:x}.unpacked")
    if not os.access(folder.parent, os.W_OK):
        folder = Path(tempfile.mkdtemp(), "unpacked")
    if not folder.is_dir():
        _extract(archive, folder)
    inside = list(folder.iterdir())
    return str(inside[0] if len(inside) == 1 and inside[0].is_dir() else folder)


def _extract(archive: str, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"{archive}: this Python cannot unpack it safely; unpack it yourself, name the folder"
        )
    try:
        with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            size, packed = 0, os.stat(archive).st_size
            for member in tar:
                size += member.size + tarfile.BLOCKSIZE
                if size > MOST_TIMES * packed:
                    raise UserError(
                        f"{archive}: its {packed:,} bytes would become {size:,} or more; do not use it"
                    )
            made = Path(temporary, "content")
            tar.extractall(made, filter="data")
            made.rename(folder)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{archive}: it cannot be unpacked safely: {str(error).splitlines()[0]}") from error


@patch("fairseq.file_utils")
def keep_archives(module: Any) -> None:
    """Every torch: from_pretrained of an archive writes where its members say, then deletes the archive."""

    @wrap(module, "load_archive_file")
    def load_archive_file(plain: Any, archive_file: Any) -> Any:
        try:
            found = module.cached_path(archive_file, cache_dir=None)
        except OSError:
            return plain(archive_file)  # says that there is none
        return found if os.path.isdir(found) else unpack(found)
