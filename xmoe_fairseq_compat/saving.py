"""What fairseq needs where it saves: whole files or none, one run to a folder, one line where it fails."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.files import (
    WriteError,
    from_all_ranks,
    named_in_errors,
    raise_on_all_ranks,
    raise_told,
    write_atomically,
)
from xmoe_fairseq_compat.folder_lock import hold
from xmoe_fairseq_compat.registry import patch, wrap


@patch("fairseq.checkpoint_utils")
def write_checkpoints_whole_or_not(module: Any) -> None:
    """Every torch: a write that fails is tried again on the same open file, ends in pages of traceback, and
    leaves a part of the file."""
    import torch

    @wrap(module, "torch_persistent_save")
    def torch_persistent_save(plain: Any, obj: Any, filename: str, async_write: bool = False) -> None:
        if module.PathManager.supports_rename(filename):
            write_atomically(filename, lambda file: torch.save(obj, file))
        else:
            plain(obj, filename, async_write)


@patch("fairseq.checkpoint_utils")
def copy_checkpoints_whole(module: Any) -> None:
    """Every torch: checkpoint_last.pt is a plain copy, so a kill at that moment leaves half a checkpoint."""
    plain = module.PathManager

    def copy_into(source: str, target: Any) -> None:
        with open(source, "rb") as file:
            shutil.copyfileobj(file, target, 1 << 20)

    class PathManager(plain):  # type: ignore[misc, valid-type]
        @staticmethod
        def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
            if not plain.supports_rename(dst_path):
                return bool(plain.copy(src_path, dst_path, overwrite))
            write_atomically(dst_path, lambda file: copy_into(src_path, file))
            return True

    module.PathManager = PathManager


@patch("fairseq.checkpoint_utils")
def say_on_all_ranks_that_saving_failed(module: Any) -> None:
    """Every torch: the rank that saves fails alone, and the others wait for it or say that it is lost."""

    @wrap(module, "save_checkpoint")
    def save_checkpoint(plain: Any, cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> None:
        error = None
        try:
            with named_in_errors(cfg.save_dir):
                plain(cfg, trainer, epoch_itr, val_loss)
        except UserError as failed:
            error = failed
        # A trainer may say which rank is gone where one does not answer.
        explained = getattr(trainer, "explained", lambda *_: contextlib.nullcontext())
        with explained("saving after update", trainer.get_num_updates()):
            told = from_all_ranks(str(error) if error else None)
        raise_told(error, told)


@patch("fairseq_cli.train")
def one_run_to_a_folder(module: Any) -> None:
    """Every torch: two runs that save into the same folder overwrite each other's checkpoints without a word,
    and a folder that may not be written ends in a traceback on one rank and a lost connection on the rest."""

    @wrap(module, "main")
    def main(plain: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        lock, error = None, None
        if not cfg.checkpoint.no_save and not cfg.distributed_training.distributed_rank:
            try:
                lock = hold(cfg.checkpoint.save_dir)
            except (FlagError, WriteError) as refused:
                error = refused
        raise_on_all_ranks(error)
        try:
            return plain(cfg, *args, **kwargs)
        finally:
            if lock:
                lock.release()


@patch("fairseq_cli.train")
def refuse_to_write_in_the_background(module: Any) -> None:
    """Every torch: --write-checkpoints-asynchronously writes damaged files, and without iopath nothing is
    trained; with exit status 0 both."""

    @wrap(module, "main")
    def main(plain: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if cfg.checkpoint.write_checkpoints_asynchronously:
            raise FlagError("--write-checkpoints-asynchronously writes damaged checkpoints; leave it out")
        return plain(cfg, *args, **kwargs)
