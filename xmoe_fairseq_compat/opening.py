"""Folders and files that a user names: what is wrong with one is said in a line."""

from __future__ import annotations

import os
import traceback
from typing import Any

from xmoe_fairseq_compat.dictionaries import languages_of
from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.registry import patch, wrap

NEEDS_PATH = "--path must name a checkpoint, such as checkpoints/checkpoint_best.pt"


@patch("fairseq.checkpoint_utils")
def name_a_missing_checkpoint(module: Any) -> None:
    """Every torch: --path that is missing, a folder or not given ends in a traceback."""

    @wrap(module, "load_model_ensemble_and_task")
    def load_model_ensemble_and_task(
        plain: Any, filenames: Any, arg_overrides: Any = None, task: Any = None, strict: bool = True,
        suffix: str = "", num_shards: int = 1, state: Any = None,
    ) -> Any:  # fmt: skip
        for name in filenames if state is None else []:
            if name is None:
                raise FlagError(NEEDS_PATH)
            if os.path.isdir(name):
                inside = os.path.join(name, "checkpoint_best.pt")
                hint = f"; name a file in it, such as {inside}" if os.path.exists(inside) else ""
                raise FlagError(f"--path must name a checkpoint, and {name} is a folder{hint}")
            for shard in range(num_shards):
                file = module.get_maybe_sharded_checkpoint_filename(name, suffix, shard, num_shards)
                if not module.PathManager.exists(file):
                    raise FlagError(f"--path: there is no checkpoint {file}")
        return plain(filenames, arg_overrides, task, strict, suffix, num_shards, state)


@patch("fairseq.checkpoint_utils")
def name_a_save_dir_that_cannot_be_written(module: Any) -> None:
    """Every torch: --save-dir that is a file, or lies in one, ends in a traceback about a file `dummy`."""

    @wrap(module, "verify_checkpoint_directory")
    def verify_checkpoint_directory(plain: Any, save_dir: str) -> None:
        try:
            plain(save_dir)
        except OSError as error:
            raise FlagError(
                f"--save-dir must be a folder that can be written, got {save_dir}: {error.strerror}"
            ) from error


@patch("fairseq.utils")
def name_what_is_wrong_with_a_user_dir(module: Any) -> None:
    """Every torch: --user-dir that is missing, or whose import fails, ends in a traceback through fairseq."""

    @wrap(module, "import_user_module")
    def import_user_module(plain: Any, args: Any) -> Any:
        folder = getattr(args, "user_dir", None)
        try:
            return plain(args)
        except UserError:
            raise
        except FileNotFoundError as error:
            if os.path.exists(str(folder)):
                raise
            raise FlagError(f"--user-dir must be a folder or an installed package, got {folder}") from error
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"--user-dir {folder}: {text} ({where.filename}:{where.lineno})") from error


@patch("fairseq.tasks")
def name_a_missing_data_folder(module: Any) -> None:
    """Every torch: a data folder that is missing or a file ends in a traceback about a dictionary in it."""

    @wrap(module, "setup_task")
    def setup_task(plain: Any, cfg: Any, **kwargs: Any) -> Any:
        name = getattr(cfg, "task", None) or getattr(cfg, "_name", None)
        own = getattr(module.TASK_REGISTRY.get(name), "__module__", "").startswith("fairseq.")
        data = getattr(cfg, "data", None)
        if own and hasattr(cfg, "data"):
            if not data:
                raise FlagError("the folder of binarised data must be given (what fairseq-preprocess wrote)")
            from fairseq.utils import split_paths

            for path in split_paths(data):
                if "://" not in path and not os.path.isdir(path):
                    state = "is a file" if os.path.exists(path) else "does not exist"
                    raise FlagError(
                        f"data must be a folder that fairseq-preprocess wrote, and {path} {state}"
                    )
        return plain(cfg, **kwargs)


@patch("fairseq.tasks.translation")
def languages_of_the_data(module: Any) -> None:
    """Every torch: of --source-lang and --target-lang, one given alone is passed over, and languages that the
    data does not have end in a traceback."""

    @wrap(module.TranslationTask, "setup_task")
    def setup_task(plain: Any, cls: Any, /, cfg: Any, **kwargs: Any) -> Any:
        folder = module.utils.split_paths(cfg.data)[0]
        pairs = languages_of(folder)
        flags = {"--source-lang": cfg.source_lang, "--target-lang": cfg.target_lang}
        for flag, language in flags.items():
            if language and not os.path.exists(os.path.join(folder, f"dict.{language}.txt")):
                holds = f", which holds {', '.join(pairs)}" if pairs else ""
                raise FlagError(f"{flag} must have a dictionary dict.{language}.txt in {folder}{holds}")
        given = [language for language in flags.values() if language]
        if len(given) == 1:
            others = {other for pair in pairs if given[0] in pair.split("-") for other in pair.split("-")}
            others -= set(given)
            if len(others) != 1:
                raise FlagError(f"--source-lang and --target-lang must both be given for {folder}")
            cfg.source_lang, cfg.target_lang = (language or others.pop() for language in flags.values())
        return plain(cls, cfg, **kwargs)
