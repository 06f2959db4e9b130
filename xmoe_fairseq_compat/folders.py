"""Data in several places: all of it was binarised with one dictionary."""

from __future__ import annotations

import os
from typing import Any

from xmoe_fairseq_compat.dictionaries import task_of
from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.registry import patch, wrap


def check_folders(task: Any, folders: list[str]) -> None:
    """Raises UserError where a folder's dictionary is another than the one that the task has read."""
    for dictionary in (task.source_dictionary, task.target_dictionary):
        file: str = getattr(dictionary, "file", None) or ""
        for folder in folders if file else []:
            other = os.path.join(folder, os.path.basename(file))
            if not os.path.exists(other) or os.path.samefile(other, file):
                continue
            # by the task, some of which have dictionaries with symbols of their own
            if task.load_dictionary(other).digest != dictionary.digest:
                raise UserError(f"{other} is another dictionary than {file}; binarise all folders with one")


@patch("fairseq.tasks.language_modeling", "fairseq.tasks.translation")
def one_dictionary_for_all_folders(module: Any) -> None:
    """Every torch: of DATA1:DATA2 the first one's dictionary counts, and the other may be of another."""
    check_when_set_up(task_of(module))


def check_when_set_up(task: Any) -> None:
    @wrap(task, "setup_task")
    def setup_task(plain: Any, cls: Any, /, cfg: Any, **kwargs: Any) -> Any:
        from fairseq.utils import split_paths

        ready = plain(cls, cfg, **kwargs)
        if cfg.data:
            check_folders(ready, split_paths(cfg.data))
        return ready


def check_language_model(model: Any, file: str, dictionary: Any) -> None:
    """Raises UserError where a language model's dictionary is not the one into which is translated."""
    if model.decoder.dictionary.symbols != dictionary.symbols:
        raise UserError(f"--lm-path {file}: its dictionary is not the target's, {dictionary.file}")
