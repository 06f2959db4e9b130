"""What an evaluating command takes from the checkpoint: settings that the command line leaves out."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xmoe_fairseq_compat.checkpoints import load_checkpoint
from xmoe_fairseq_compat.components import unknown
from xmoe_fairseq_compat.errors import CheckpointError, FlagError, UserError, flag
from xmoe_fairseq_compat.files import MAPPED
from xmoe_fairseq_compat.misfits import typed_words
from xmoe_fairseq_compat.opening import NEEDS_PATH
from xmoe_fairseq_compat.registry import patch, stand_in

# Of a language model's task: how the text is cut, and what the model reads and predicts.
OF_LANGUAGE_MODELS = (
    "tokens_per_sample", "sample_break_mode", "add_bos_token", "output_dictionary_size", "self_target",
    "future_target", "past_target",
)  # fmt: skip


def on_command_line(*flags: str) -> list[str | None]:
    """Values of flags, before the command's own parser, which needs them, is made; None where not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in flags:
        parser.add_argument(name)
    known, _ = parser.parse_known_args(sys.argv[1:])
    return [getattr(known, name.lstrip("-").replace("-", "_")) for name in flags]


def given(names: Iterable[str]) -> set[str]:
    """Which settings the command line gives (fairseq takes no abbreviations)."""
    flags = {word.partition("=")[0] for word in typed_words()}
    return {name for name in names if flag(name) in flags}


def saved_config(path: str) -> dict[str, dict[str, Any]]:
    """The parts of the configuration with which a checkpoint was trained; its tensors are not read.

    Raises:
        CheckpointError: it is none.
    """
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    state = load_checkpoint(path, sums=False, **MAPPED)
    cfg = state.get("cfg") or convert_namespace_to_omegaconf(state["args"])
    whole: Any = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    parts = {
        name: vars(part) if isinstance(part, argparse.Namespace) else part for name, part in whole.items()
    }
    known = {name: part for name, part in parts.items() if isinstance(part, dict)}
    trained_on = (state.get("task_state") or {}).get("trained_on", {})
    languages = {name: trained_on[name] for name in ("source_lang", "target_lang") if name in trained_on}
    known["task"] = known.get("task", {}) | languages  # which a command line may have left to be found out
    return known


def checkpoint_config() -> dict[str, dict[str, Any]]:
    """Of the first checkpoint that --path names; empty where the command is to say itself what is wrong."""
    from fairseq.utils import split_paths

    (path,) = on_command_line("--path")
    if path is None:
        if {"-h", "--help"} & set(sys.argv):
            return {}
        raise FlagError(NEEDS_PATH)
    first = split_paths(path)[0]
    return saved_config(first) if Path(first).is_file() else {}


def trained_task(needed: bool = True) -> tuple[str | None, Any]:
    """Name and class of the checkpoint's task; None where there is none to read.

    Raises:
        CheckpointError: fairseq has no such task, and it is needed, for the command line names none.
    """
    from fairseq import utils
    from fairseq.tasks import TASK_REGISTRY

    path, folder = on_command_line("--path", "--user-dir")
    name = checkpoint_config().get("task", {}).get("_name")
    utils.import_user_module(argparse.Namespace(user_dir=folder))
    if needed and name is not None and name not in TASK_REGISTRY:
        raise CheckpointError(path, unknown("task", name))
    return name, TASK_REGISTRY.get(name)


def complete(args: Any, saved: dict[str, Any], names: Iterable[str], command: str) -> None:
    """Put the checkpoint's settings into `args` where the command line gives none."""
    taken = {name: saved[name] for name in names if name in saved and name not in given(names)}
    differ = {name: value for name, value in taken.items() if getattr(args, name, None) != value}
    for name, value in differ.items():
        setattr(args, name, value)
    if differ:
        listed = ", ".join(f"{flag(name)} {value}" for name, value in differ.items())
        logging.getLogger(command).info("as the checkpoint was trained: %s", listed)


def complete_defaults(cfg: Any) -> None:
    """As `complete`, for a configuration that was made of parsed flags: a default tells of no choice."""
    from fairseq.tasks.language_modeling import LanguageModelingConfig
    from fairseq.utils import split_paths

    first = split_paths(cfg.common_eval.path)[0]
    saved = saved_config(first).get("task", {}) if Path(first).is_file() else {}
    for name in OF_LANGUAGE_MODELS:
        field = LanguageModelingConfig.__dataclass_fields__[name]
        if name in saved and cfg.task.get(name) == field.default:
            cfg.task[name] = saved[name]


@patch("fairseq_cli.eval_lm")
def evaluate_as_trained(module: Any) -> None:
    """Every torch: fairseq-eval-lm cuts the text into blocks of 1024 unless told, drops those that are longer
    than the model takes, and so scores a fragment or nothing ("Perplexity: 1.00")."""
    options = module.options

    def get_eval_lm_parser() -> Any:
        name, task = trained_task()
        if task is not None and not hasattr(task, "eval_lm_dataloader"):
            (path,) = on_command_line("--path")
            raise UserError(f"fairseq-eval-lm scores language models; {path} was trained with --task {name}")
        return options.get_eval_lm_parser(name or "language_modeling")

    def parse_args_and_arch(parser: Any) -> Any:
        args = options.parse_args_and_arch(parser)
        saved = checkpoint_config()
        if not saved:  # the command says itself what is wrong with --path
            return args
        complete(args, saved.get("task", {}), OF_LANGUAGE_MODELS, module.logger.name)
        positions = saved.get("model", {}).get("max_target_positions") or saved["task"]["tokens_per_sample"]
        asked = args.max_target_positions
        if asked not in (None, positions):
            raise FlagError(
                f"--max-target-positions must be the model's own, {positions}, got {asked}; to change it give"
                f" --model-overrides \"{{'max_target_positions': {asked}}}\""
            )
        if not 0 <= args.context_window < args.tokens_per_sample:
            raise FlagError(
                "--context-window must be at least 0 and below --tokens-per-sample"
                f" ({args.tokens_per_sample}), got {args.context_window}"
            )
        return args

    module.options = stand_in(
        options, get_eval_lm_parser=get_eval_lm_parser, parse_args_and_arch=parse_args_and_arch
    )


@patch("fairseq_cli.generate", "fairseq_cli.interactive")
def translate_as_trained(module: Any) -> None:
    """Every torch: without --source-lang and --target-lang, the direction comes from the names of files, and
    a model may translate the wrong way round; and a language model in --task translation scores BLEU 0."""
    options = module.options

    def parse_args_and_arch(parser: Any) -> Any:
        from fairseq.tasks import TASK_REGISTRY

        args = options.parse_args_and_arch(parser)
        name, task = trained_task(needed=False)
        language_model = hasattr(task, "eval_lm_dataloader")
        asked = TASK_REGISTRY[args.task]  # one of a user's own may do anything with a model
        of_fairseq = all(kind.__module__.startswith("fairseq.") for kind in (task, asked) if kind)
        if task is not None and of_fairseq and language_model != hasattr(asked, "eval_lm_dataloader"):
            raise UserError(f"{args.path} was trained with --task {name}, and cannot do --task {args.task}")
        languages = ("source_lang", "target_lang")
        one_given = any(getattr(args, side, None) for side in languages)
        taken = OF_LANGUAGE_MODELS if language_model else () if one_given else languages
        if name == args.task:
            saved = checkpoint_config()["task"]
            complete(args, saved, taken, "fairseq_cli.generate")
            there, asked = [[part.get(side) for side in languages] for part in (saved, vars(args))]
            if one_given and asked == there[::-1] != there:
                warning = "the model was trained from %s to %s, not from %s to %s"
                logging.getLogger("fairseq_cli.generate").warning(warning, *there, *asked)
        return args

    module.options = stand_in(options, parse_args_and_arch=parse_args_and_arch)


@patch("fairseq_cli.validate")
def validate_as_trained(module: Any) -> None:
    """Every torch: without --task, which the checkpoint knows, fairseq-validate ends in `KeyError: None`."""
    options = module.options

    def get_validation_parser() -> Any:
        return options.get_validation_parser(trained_task()[0] or "translation")

    def parse_args_and_arch(parser: Any, suppress_defaults: bool = False) -> Any:
        args = options.parse_args_and_arch(parser, suppress_defaults=suppress_defaults)
        if not suppress_defaults and args.max_tokens is None and args.batch_size is None:
            raise FlagError("--batch-size or --max-tokens must be given")
        return args

    module.options = stand_in(
        options, get_validation_parser=get_validation_parser, parse_args_and_arch=parse_args_and_arch
    )
