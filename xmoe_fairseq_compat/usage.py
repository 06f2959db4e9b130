"""What a command says that was called with a name it does not know."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from xmoe_fairseq_compat.errors import UserError, flag, one_line
from xmoe_fairseq_compat.plugins import models, plugin_of
from xmoe_fairseq_compat.registry import patch, stand_in, wrap

FEW = 12  # so many names are listed: a choice


def hint(name: str, known: Iterable[str]) -> str:
    """Which of the names that there are was meant."""
    known = [str(each) for each in known]
    plugin = plugin_of(name)
    if plugin and not any(each.startswith(plugin.name) for each in known):
        return f"; it comes with --user-dir {plugin.value}"
    if len(known) <= FEW:
        return f"; choose from {', '.join(known)}"
    close = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(close)}?" if close else "; --help lists what there is"


def hint_of_flags(flags: list[str], known: Iterable[str]) -> str:
    known = list(known)
    name, plugin = next(((name, found) for name in flags if (found := plugin_of(name))), ("", None))
    if plugin and not any(each.startswith(flag(plugin.name)) for each in known):
        if "--model-overrides" in known:  # the command opens a checkpoint
            name = name[2:].replace("-", "_")
            return f"; a checkpoint's own settings are changed with --model-overrides \"{{'{name}': ...}}\""
        arch = f"--arch {' or '.join(models())}" if models() else "one of its --arch"
        return f"; the {flag(plugin.name)}* flags come with --user-dir {plugin.value} and {arch}"
    close = [each for name in flags for each in difflib.get_close_matches(name, known, 1, 0.75)]
    if close:
        return f"; did you mean {' and '.join(close)}?"
    return "; --help lists the flags of this --task, --arch and the like"


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line each."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match("unrecognized arguments: (.*)", message, re.S)
        if unknown:
            flags = [word.partition("=")[0] for word in unknown[1].split() if word.startswith("--")]
            message += hint_of_flags(flags, self._option_string_actions)
        message = re.sub("invalid <lambda> value", "not a number or a list such as 1 or [1,2]", message)
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            text = f"there is no {value!r}{hint(str(value), action.choices)}"
            raise argparse.ArgumentError(action, text)


@patch("fairseq.options", "fairseq_cli.score")
def errors_without_usage(module: Any) -> None:
    """Every torch: one misspelt flag prints 197 lines of usage, one misspelt name a list of 150."""
    module.argparse = stand_in(argparse, ArgumentParser=Parser)


@patch("fairseq_cli.score")
def order_of_bleu(module: Any) -> None:
    """Every torch: fairseq-score --order 0 divides by zero, -1 scores 100 (its Scorer knows 1 to 4)."""

    @wrap(module, "get_parser")
    def get_parser(plain: Any) -> Any:
        parser = plain()
        parser._option_string_actions["--order"].choices = (1, 2, 3, 4)
        return parser


def in_one_line(error: Exception) -> str:
    """hydra's and omegaconf's errors take some lines, of which the first names the key or value."""
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    return "; ".join(line for line in lines if line and not re.match("object_type|reference_type", line))


REFERENCE = r"(?:Interpolation key '|access )(task|criterion|optimization|common)\.(\w+)"


def explained(error: Exception) -> Exception:
    """The same error, or what hydra and omegaconf have to say of a setting, in one line."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return UserError(f"{group}={name}: there is no {name!r}{hint(name, error.options)}")
    if one_line(error):
        return error
    if isinstance(error, InterpolationResolutionError) and (asked := re.search(REFERENCE, str(error))):
        reader, (group, name) = str(error.full_key).partition(".")[0], asked.groups()
        return UserError(f"the {reader} takes {flag(name)} from the {group}, and this {group} has none")
    known = isinstance(error, (HydraException, OmegaConfBaseException))
    return UserError(in_one_line(error)) if known else error


@patch("fairseq.dataclass.utils")
def settings_in_one_line(module: Any) -> None:
    """Every torch: a value that a setting does not take (--tokenizer moses without --source-lang) ends in a
    page of all settings there are."""

    @wrap(module, "convert_namespace_to_omegaconf")
    def convert_namespace_to_omegaconf(plain: Any, args: Any) -> Any:
        try:
            return plain(args)
        except Exception as error:
            raise explained(error) from error

    module.logger.addFilter(lambda record: not record.getMessage().startswith("Error when composing"))


@patch("fairseq_cli.hydra_train")
def hydra_errors_in_one_line(module: Any) -> None:
    """Every torch: hydra reports any error in a block of lines, a misspelt task in all that there are."""
    from hydra._internal import utils

    utils.argparse = stand_in(argparse, ArgumentParser=Parser)

    @wrap(module, "_hydra_main")
    def _hydra_main(plain: Any, cfg: Any, **kwargs: Any) -> Any:
        """Ends here what a user can fix: hydra would precede it by all that it was called with."""
        try:
            return plain(cfg, **kwargs)
        except Exception as error:
            if one_line(explained(error)) is None:
                raise
            sys.excepthook(type(error), explained(error), None)
            sys.exit(1)

    @wrap(module, "cli_main")
    def cli_main(plain: Any) -> None:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors through
        try:
            plain()
        except Exception as error:
            raise explained(error) from error
