"""--model-overrides, and what from_pretrained takes in Python: nothing that is asked for is passed over."""

from __future__ import annotations

import ast
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from xmoe_fairseq_compat.errors import NO_LITERAL, FlagError
from xmoe_fairseq_compat.override_rules import add_newer, check_overrides, refuse, refuse_flag
from xmoe_fairseq_compat.registry import patch, wrap
from xmoe_fairseq_compat.settings import when_parsed

# What fairseq's own functions add to what they are given: hub_utils.from_pretrained, and those of its models.
HANDED = {"data", "user_dir", "bpe_codes", "bpe_merges", "bpe_vocab", "sentencepiece_model"}
HANDED |= {
    "load_checkpoint_heads",
    "sample_break_mode",
    "layernorm_embedding",
    "config_yaml",
    "vocoder",
    "fp16",
}


def read_overrides(text: str) -> dict[str, Any]:
    """Raises FlagError if --model-overrides is no dictionary of literals with names as keys."""
    try:
        overrides = ast.literal_eval(text)
    except NO_LITERAL:
        overrides = None
    if not isinstance(overrides, dict):
        example = "\"{'max_target_positions': 1024}\""
        raise FlagError(
            f"--model-overrides must be a dictionary of literals, such as {example}, got {text!r}"
        )
    return dict(names_only(overrides))


def names_only(overrides: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in overrides.items():
        if not isinstance(name, str):
            refuse(f"a setting must be named by a string, got {name!r}")
        if isinstance(value, dict):
            yield name, dict(names_only(value))
        elif "${" in repr(value) or value == "???":
            refuse(f"{name} must be a value, not a reference to one, got {value!r}")
        else:
            yield name, value


def asked_for(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Of what load_model_ensemble_and_task is given, that which the user means to change."""
    if "path" in overrides:  # by fairseq-validate: all flags of the command line
        return read_overrides(overrides.get("model_overrides") or "{}")
    return dict(names_only({name: value for name, value in overrides.items() if name not in HANDED}))


class Asked(dict[str, Any]):
    """All overrides, with that which the user asked for, and the checkpoint's path."""

    def __init__(self, overrides: Mapping[str, Any]) -> None:
        super().__init__(overrides)
        self.asked = asked_for(overrides)
        self.pop("user_dir", None)  # imported by now; the checkpoint's own says what it was trained with
        self.path: Any = None


@patch("fairseq.options")
def read_overrides_first(module: Any) -> None:
    """Every torch: no dictionary ends late, in a traceback; flags of generation are passed over."""

    def see(namespace: Namespace, parser: Any) -> None:
        from fairseq.dataclass.configs import GenerationConfig

        text = getattr(namespace, "model_overrides", None)
        for name in () if text is None else read_overrides(text):
            if name in GenerationConfig.__dataclass_fields__ or name in ("bpe", "tokenizer"):
                refuse_flag(name, name)

    when_parsed(module, see)


@patch("fairseq.checkpoint_utils")
def refuse_overrides_of_nothing(module: Any) -> None:
    """Every torch: a misspelt name is passed over, and a study varies nothing; no value's kind is checked."""

    @wrap(module, "load_model_ensemble_and_task")
    def load_model_ensemble_and_task(
        plain: Any, filenames: Any, arg_overrides: Any = None, *args: Any, **more: Any
    ) -> Any:
        overrides = None if arg_overrides is None else Asked(arg_overrides)
        return plain(filenames, overrides, *args, **more)

    @wrap(module, "load_checkpoint_to_cpu")
    def load_checkpoint_to_cpu(
        plain: Any, path: Any, arg_overrides: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(arg_overrides, Asked):
            arg_overrides.path = path
        return plain(path, arg_overrides, *args, **kwargs)

    @wrap(module, "overwrite_args_by_name")
    def overwrite_args_by_name(plain: Any, cfg: Any, overrides: Any) -> None:
        if isinstance(overrides, Asked):
            add_newer(overrides.asked, cfg)
            check_overrides(overrides.asked, cfg, overrides.path)
        plain(cfg, overrides)
