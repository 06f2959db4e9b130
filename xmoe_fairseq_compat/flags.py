"""The rules of flag_rules.py, wherever a setting comes from: command line, hydra, checkpoint, overrides."""

from __future__ import annotations

import ast
import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xmoe_fairseq_compat.errors import NO_LITERAL, FlagError, flag
from xmoe_fairseq_compat.flag_rules import RUN, TRANSFORMER, Holds, Rule, numbers
from xmoe_fairseq_compat.registry import patch, wrap
from xmoe_fairseq_compat.settings import as_dict, when_parsed

HYDRAS = re.compile(r"\$\{|\\$|\\'")  # what hydra does not take as it is
DICTIONARIES: dict[str, tuple[Callable[[str], Any], str]] = {
    "eval_bleu_args": (json.loads, "'{\"beam\": 4}'"),
    "eval_bleu_detok_args": (json.loads, '\'{"target_lang": "en"}\''),
    "optimizer_overrides": (ast.literal_eval, "\"{'lr': 0.1}\""),
}


def check(settings: Mapping[str, Any], rules: Iterable[Rule]) -> None:
    """Raises FlagError for the first setting that breaks a rule; one that is not given, or that refers to
    another (`${...}`), breaks none."""
    given = {name: value for name, value in settings.items() if value is not None}
    given = {name: value for name, value in given.items() if not str(value).startswith("${")}
    for names, rule, holds in rules:
        for name in names.split():
            if name in given:
                try:
                    given[name] = as_number(given[name])
                    holds_for_each = _each(given[name], given, holds)
                except KeyError:  # a rule between two settings, of which one is not given
                    continue
                if not holds_for_each:
                    raise FlagError(f"{flag(name)} {rule.format(**given)}, got {settings[name]}")


def as_number(value: Any) -> Any:
    """Numbers that fairseq keeps as a string, such as "(0.9, 0.98)"."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except NO_LITERAL:
        return value


def _each(value: Any, given: Mapping[str, Any], holds: Holds) -> bool:
    if isinstance(value, (str, Mapping)):
        return False
    values = numbers(value)
    try:
        return bool(values) and all(holds(each, given) for each in values)
    except TypeError:  # something that is no number
        return False


def check_strings(settings: Mapping[str, Any]) -> None:
    """Raises FlagError for a setting that must spell a dictionary and does not, or name a detokenizer."""
    detokenizer = settings.get("eval_bleu_detok")
    if settings.get("eval_bleu") and detokenizer:
        from fairseq.data.encoders import TOKENIZER_REGISTRY

        if detokenizer not in TOKENIZER_REGISTRY:
            known = ", ".join(TOKENIZER_REGISTRY)
            raise FlagError(f"--eval-bleu-detok must be one of {known}, got {detokenizer}")
    for name, (read, example) in DICTIONARIES.items():
        text = settings.get(name)
        if isinstance(text, str):
            try:
                fits = isinstance(read(text), dict)
            except NO_LITERAL:
                fits = False
            if not fits:
                raise FlagError(f"{flag(name)} must be a dictionary such as {example}, got {text}")


def own_settings(parser: Any, namespace: Any) -> dict[str, Any]:
    """Of a command line: without flags that a user's model or task has beside fairseq's of the same name."""
    from fairseq.dataclass.configs import GenerationConfig

    settings = dict(vars(namespace))
    if "--max-update" in parser._option_string_actions:  # fairseq-train, which has none of generation
        for name in GenerationConfig.__dataclass_fields__:
            settings.pop(name, None)
    return settings


@patch("fairseq.options")
def check_flags(module: Any) -> None:
    """Every torch: fairseq checks next to no value, so nonsense ends in a traceback or, worse, trains."""

    def see(namespace: Namespace, parser: ArgumentParser) -> None:
        for name, value in vars(namespace).items():
            if name == "model_overrides" or value == parser.get_default(name):  # or its own message
                continue
            if isinstance(value, str) and HYDRAS.search(value):
                raise FlagError(
                    f"{flag(name)} must not hold ${{ (which stands for another setting), nor a backslash at "
                    f"its end or before a quote, got {value}"
                )
        check(own_settings(parser, namespace), RUN)
        check_strings(vars(namespace))

    when_parsed(module, see)


@patch("fairseq_cli.preprocess")
def check_flags_of_preprocessing(module: Any) -> None:
    """Every torch: as of the other commands, which parse theirs in another way."""

    @wrap(module, "main")
    def main(plain: Any, args: Any) -> Any:
        check(vars(args), RUN)
        return plain(args)


@patch("fairseq_cli.hydra_train")
def check_settings_of_hydra(module: Any) -> None:
    """Every torch: as on the command line."""
    from omegaconf import OmegaConf

    @wrap(module, "_hydra_main")
    def _hydra_main(plain: Any, cfg: Any, **kwargs: Any) -> Any:
        lr = as_dict(cfg.optimization)["lr"]  # which a scheduler's settings refer to
        for group in cfg:
            if OmegaConf.is_dict(cfg[group]):
                settings = as_dict(cfg[group])
                check(settings | {"lr": lr}, RUN)
                check_strings(settings)
        return plain(cfg, **kwargs)


@patch("fairseq.models.transformer.transformer_base", "fairseq.models.transformer_lm")
def check_sizes_of_a_model(module: Any) -> None:
    """Every torch: widths, heads and the like fail somewhere inside, dropout is not checked at all; what a
    checkpoint, hydra or --model-overrides says passes here too."""
    name = {"transformer_base": "TransformerModelBase", "transformer_lm": "TransformerLanguageModel"}
    model = getattr(module, name[module.__name__.rpartition(".")[2]])

    @wrap(model, "build_model")
    def build_model(plain: Any, cls: Any, cfg: Any, task: Any) -> Any:
        settings = dict(as_dict(cfg))  # a copy
        for side in ("encoder", "decoder"):  # fairseq's TransformerConfig is nested
            inner = as_dict(settings.get(side))
            settings |= {f"{side}_{name}": value for name, value in inner.items()}
        check(settings, TRANSFORMER)
        return plain(cls, cfg, task)
