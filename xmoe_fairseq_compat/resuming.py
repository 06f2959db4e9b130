"""What fairseq needs where a run goes on from a checkpoint: nothing passed over, and one line why not."""

from __future__ import annotations

from typing import Any

from xmoe_fairseq_compat.checkpoints import load_checkpoint as load
from xmoe_fairseq_compat.errors import CheckpointError, FlagError, UserError, flag
from xmoe_fairseq_compat.files import MAPPED, from_all_ranks, raise_on_all_ranks
from xmoe_fairseq_compat.misfits import (
    SILENT,
    WeightsError,
    check_left_out,
    misfit,
    other_sizes,
    settings_of,
)
from xmoe_fairseq_compat.registry import patch, wrap
from xmoe_fairseq_compat.settings import as_dict

DEFAULT = "checkpoint_last.pt"
RESETS = ("reset_optimizer", "reset_lr_scheduler", "reset_meters", "reset_dataloader")


def check_named_files(cfg: Any, suffix: str, is_file: Any) -> None:
    """Raises FlagError if a checkpoint that was asked for is not there.

    Args:
        cfg: fairseq's CheckpointConfig.
        suffix: of this rank's checkpoints.
    """
    pretrained, named = cfg.finetune_from_model, cfg.restore_file != DEFAULT
    if pretrained and named:
        raise FlagError(f"--finetune-from-model and --restore-file {cfg.restore_file} cannot be combined")
    for reset in RESETS if pretrained else ():
        if getattr(cfg, reset):
            raise FlagError(f"{flag(reset)} cannot be combined with --finetune-from-model, which resets all")
    first = not is_file(f"{cfg.save_dir}/checkpoint_last{suffix}.pt")
    wanted = {
        "--restore-file": cfg.restore_file.replace(".pt", suffix + ".pt") if named else None,
        "--continue-once": getattr(cfg, "continue_once", None) if first else None,
        "--finetune-from-model": pretrained if first else None,
    }
    for name, path in wanted.items():
        if path and not is_file(path):
            raise FlagError(f"{name}: there is no file {path}")


@patch("fairseq.checkpoint_utils")
def refuse_a_missing_checkpoint(module: Any) -> None:
    """Every torch: a --restore-file that is not there, or a folder, trains from scratch without a word."""

    @wrap(module, "load_checkpoint")
    def load_checkpoint(plain: Any, cfg: Any, trainer: Any, **passthrough: Any) -> Any:
        error = None
        try:
            check_named_files(cfg, trainer.checkpoint_suffix or "", module.PathManager.isfile)
        except FlagError as refused:
            error = refused
        raise_on_all_ranks(error)
        return plain(cfg, trainer, **passthrough)


def check_model(filename: str, state: dict[str, Any], cfg: Any) -> None:
    """Raises CheckpointError if the weights would fit, and the model compute something else."""
    saved, here = settings_of(state), as_dict(cfg.model)
    names = [name for name in saved if SILENT.fullmatch(name) and None not in (saved[name], here.get(name))]
    changed = {name: (saved[name], here[name]) for name in names if str(saved[name]) != str(here[name])}
    check_left_out(filename, changed)


def check_scheduler(filename: str, state: dict[str, Any], cfg: Any) -> None:
    """Raises CheckpointError if the learning rate would go on by another rule than the checkpoint's."""
    saved = as_dict(as_dict(state.get("cfg")).get("lr_scheduler")).get("_name")
    here = getattr(cfg.lr_scheduler, "_name", None)
    if None not in (saved, here) and saved != here:
        raise CheckpointError(
            filename,
            f"it was trained with --lr-scheduler {saved}, this run has {here}; add --reset-lr-scheduler to go"
            " on with the new one, or give another --save-dir",
        )


@patch("fairseq.trainer")
def look_at_a_checkpoint_first(module: Any) -> None:
    """Every torch: what is wrong with a checkpoint shows amid loading, on one rank or in pages, another
    scheduler not at all. A trainer may have a look too, in a method `check_checkpoint`."""

    def look(self: Any, filename: str, keep_optimizer: bool, keep_scheduler: bool) -> None:
        path = module.PathManager.get_local_path(filename)
        state = load(path, sums=False, **MAPPED)  # no tensor is read
        if keep_optimizer and not state.get("last_optimizer_state"):
            anew = "optimizer, learning rate and number of updates begin anew"
            module.logger.warning(f"{filename} holds no optimizer's state: {anew}")
        elif keep_optimizer and keep_scheduler:
            check_scheduler(filename, state, self.cfg)
        check_model(filename, state, self.cfg)
        if hasattr(self, "check_checkpoint"):
            self.check_checkpoint(filename, state)

    @wrap(module.Trainer, "load_checkpoint")
    def load_checkpoint(
        plain: Any, self: Any, filename: str, reset_optimizer: bool = False, reset_lr_scheduler: bool = False,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        is_there = from_all_ranks(bool(module.PathManager.isfile(filename)))
        if len(set(is_there)) > 1:
            rank = is_there.index(not is_there[0])
            seer, blind = (0, rank) if is_there[0] else (rank, 0)
            raise CheckpointError(
                filename, f"rank {seer} sees it and rank {blind} does not; all ranks must share its folder"
            )
        error = None
        if is_there[0] and self.data_parallel_rank == 0:
            try:
                look(self, filename, not reset_optimizer, not reset_lr_scheduler)
            except UserError as refused:
                error = refused
        raise_on_all_ranks(error)
        return plain(self, filename, reset_optimizer, reset_lr_scheduler, *args, **kwargs)


@patch("fairseq.trainer")
def say_why_a_checkpoint_does_not_fit(module: Any) -> None:
    """Every torch: weights of other sizes, another criterion or optimizer end in pages of traceback."""

    @wrap(module.Trainer, "load_checkpoint")
    def load_checkpoint(plain: Any, self: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain(self, filename, *args, **kwargs)
        except AssertionError as error:
            what, _, classes = str(error).partition(" does not match; please reset the optimizer ")
            if not classes:
                raise
            saved, _, here = classes.partition(". ")[2].partition(" vs ")
            raise CheckpointError(
                filename,
                f"it was trained with the {what.lower()} {saved}, this run has {here}; add --reset-optimizer"
                " to go on with the new one, or give another --save-dir",
            ) from None
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise CheckpointError(
                filename,
                "its optimizer's state is of other groups of parameters (--fp16 has one, --bf16 has many);"
                " add --reset-optimizer to go on with a new one, or give another --save-dir",
            ) from None
        except Exception as error:
            cause: Any = error.__context__
            if isinstance(error, UserError) or "Cannot load model parameters" not in str(error):
                raise
            if not isinstance(cause, WeightsError):
                raise CheckpointError(filename, f"it does not fit the model: {cause!r}") from error
            state = load(filename, sums=False, **MAPPED)
            sizes = other_sizes(settings_of(state), as_dict(self.cfg.model))
            raise CheckpointError(filename, f"{cause}{sizes}") from error


@patch("fairseq.models.fairseq_model")
def name_the_weights_that_do_not_fit(module: Any) -> None:
    """Every torch: weights of other sizes are listed on a page, one by one."""

    def patched(plain_load: Any) -> Any:
        def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return plain_load(self, *args, **kwargs)
            except RuntimeError as error:
                text = misfit(str(error))
                if text is None:
                    raise
                raise WeightsError(text) from error

        return load_state_dict

    for model in (module.BaseFairseqModel, module.FairseqMultiModel):
        model.load_state_dict = patched(model.load_state_dict)


@patch("fairseq.checkpoint_utils")
def name_the_checkpoint_that_does_not_fit(module: Any) -> None:
    """Every torch: where weights do not fit the model, the file is not named."""

    @wrap(module, "load_model_ensemble_and_task")
    def load_model_ensemble_and_task(plain: Any, filenames: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain(filenames, *args, **kwargs)
        except WeightsError as error:
            raise CheckpointError(", ".join(map(str, filenames)), str(error)) from error
