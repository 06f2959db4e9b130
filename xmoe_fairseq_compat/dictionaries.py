"""A dictionary is whole, and the one that the model was trained with."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.registry import patch, replaced, stand_in, wrap

FLAG = " #fairseq:overwrite"


class DictionaryError(UserError, RuntimeError, ValueError):
    """An entry that is wrong; stock fairseq raises one of the other two."""


def lines_of(file: str) -> list[str]:
    """Raises UserError where the file is missing or not UTF-8."""
    from fairseq.file_io import PathManager

    try:
        with open(PathManager.get_local_path(file), "rb") as opened:
            lines = opened.read().splitlines(keepends=True)
    except OSError as error:
        problem = "is the data folder, and the language, the right one?"
        raise UserError(f"cannot read dictionary {file}: {error.strerror}; {problem}") from error
    decoded = []
    for number, line in enumerate(lines, 1):
        try:
            decoded.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{file}, line {number}: not UTF-8; encode the file anew") from None
    return decoded


def add_entries(dictionary: Any, lines: Iterable[str], first: int, file: str) -> None:
    """Raises UserError, with the number of the line, for what is no entry or repeats one."""
    for number, line in enumerate(lines, first):
        entry = line.rstrip()
        overwrite = entry.endswith(FLAG)
        word, _, count = entry.removesuffix(FLAG).rpartition(" ")
        if not (word and count.isascii() and count.isdigit()):
            rule = "must be a token, a space and its count (0 or more)"
            raise DictionaryError(f"{file}, line {number}: {rule}, got {entry[:80]!r}")
        if word in dictionary and not overwrite:
            rule = f"leave one out, or end the later line with{FLAG}"
            raise DictionaryError(f"{file}, line {number}: Duplicate of {word[:80]!r}; {rule}")
        dictionary.add_symbol(word, n=int(count), overwrite=overwrite)


@patch("fairseq.data.dictionary")
def say_what_is_wrong_with_a_dictionary(module: Any) -> None:
    """Every torch: a dictionary that is missing, damaged or of another encoding ends in a traceback without
    the line, and counts may be negative."""

    def add_from_file(self: Any, f: Any) -> None:
        named = isinstance(f, str)
        lines = lines_of(f) if named else f.readlines()
        first = self._load_meta(lines)
        file = f if named else str(getattr(f, "name", "dictionary"))
        add_entries(self, lines[first:], first + 1, file)
        self.file, self.digest = file, digest(self.symbols)

    module.Dictionary.add_from_file = add_from_file


def digest(symbols: list[str]) -> str:
    """The same for the same entries in the same order, whatever their counts."""
    return hashlib.sha256("\n".join(symbols).encode()).hexdigest()


def dictionary_of(task: Any, side: str) -> Any:
    """None for a task of a user's own that has none: its data need not be text."""
    try:
        return getattr(task, f"{side}_dictionary", None)
    except NotImplementedError:
        return None


def trained_on(task: Any) -> dict[str, Any]:
    """What a checkpoint is to say of the dictionaries, and of the languages if there are two."""
    sides = {side: dictionary_of(task, side) for side in ("source", "target")}
    found: dict[str, Any] = {
        side: {"entries": len(symbols), "digest": symbols.digest}
        for side, symbols in sides.items()
        if hasattr(symbols, "digest")
    }
    languages = {name: getattr(task.cfg, name, None) for name in ("source_lang", "target_lang")}
    return found | {name: language for name, language in languages.items() if language}


def check_dictionaries(task: Any, saved: dict[str, Any]) -> None:
    """Raises UserError where a dictionary of the task is another than `trained_on` said when training."""
    now = trained_on(task)
    for side in now.keys() & saved.keys() & {"source", "target"}:
        if now[side] != saved[side]:
            file = getattr(task, f"{side}_dictionary").file
            numbers = f"{now[side]['entries']} entries, the model's {saved[side]['entries']}"
            same = now[side]["entries"] == saved[side]["entries"]
            how = "its entries are others, or in another order" if same else f"it has {numbers}"
            raise UserError(
                f"{file} is not the dictionary that the model was trained with: {how}; use data that was"
                " binarised with the model's"
            )


def task_of(module: Any) -> Any:
    """The class that a module of fairseq.tasks is for: language_modeling or translation."""
    return getattr(module, "TranslationTask", None) or module.LanguageModelingTask


@patch("fairseq.tasks.language_modeling", "fairseq.tasks.translation")
def know_the_dictionaries_of_training(module: Any) -> None:
    """Every torch: a checkpoint does not know its dictionaries, so another of as many entries passes, and the
    model reads other words than were written. Checkpoints without this are taken as they are."""
    remember_dictionaries(task_of(module))


def remember_dictionaries(task: Any) -> None:
    """In a task class's state, which is part of a checkpoint."""

    @wrap(task, "state_dict")
    def state_dict(plain: Any, self: Any) -> dict[str, Any]:
        return {**plain(self), "trained_on": trained_on(self)}

    @wrap(task, "load_state_dict")
    def load_state_dict(plain: Any, self: Any, state: dict[str, Any]) -> None:
        check_dictionaries(self, state.get("trained_on", {}))
        plain(self, {name: value for name, value in state.items() if name != "trained_on"})


@patch("fairseq.trainer")
def resume_with_the_same_dictionaries(module: Any) -> None:
    """Every torch: training goes on with another dictionary of as many entries. (A warning for fine-tuning,
    where unused entries may have been given to new words.)"""

    @wrap(module.Trainer, "load_checkpoint")
    def load_checkpoint(
        plain: Any, self: Any, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        utils = module.checkpoint_utils

        def load_checkpoint_to_cpu(*args: Any, **kwargs: Any) -> Any:
            state = utils.load_checkpoint_to_cpu(*args, **kwargs)
            try:
                check_dictionaries(self.task, (state.get("task_state") or {}).get("trained_on", {}))
            except UserError as error:
                if not reset_optimizer:
                    raise
                logging.getLogger("fairseq.trainer").warning("%s", error)
            return state

        with replaced(
            module, checkpoint_utils=stand_in(utils, load_checkpoint_to_cpu=load_checkpoint_to_cpu)
        ):
            return plain(self, filename, reset_optimizer, *args, **kwargs)


def names_in(folder: str) -> list[str]:
    """Of a data folder's files. Raises UserError where there is no such folder."""
    from fairseq.file_io import PathManager

    try:
        return list(PathManager.ls(folder))
    except OSError as error:
        raise UserError(f"cannot read data folder {folder}: {error.strerror}") from error


def languages_of(folder: str) -> list[str]:
    """The pairs in the names of a data folder's files, such as en-de. Raises UserError as `names_in`."""
    names = [name.split(".") for name in names_in(folder)]
    return sorted({parts[1] for parts in names if len(parts) >= 3 and len(parts[1].split("-")) == 2})


@patch("fairseq.data.data_utils")
def infer_a_language_pair_if_it_is_one(module: Any) -> None:
    """Every torch: of the language pairs in a data folder, the first in the order of the file system is
    taken; and a folder without any is an exception that does not name it."""

    def infer_language_pair(path: str) -> list[str]:
        pairs = languages_of(path)
        if len(pairs) != 1:
            found = f"holds {', '.join(pairs)}" if pairs else "holds no pair of languages"
            raise UserError(f"{path} {found}; give --source-lang and --target-lang, or another folder")
        return pairs[0].split("-")

    module.infer_language_pair = infer_language_pair
