"""Why the weights of a checkpoint do not fit a model, in one line."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.errors import CheckpointError, UserError, flag
from xmoe_fairseq_compat.registry import patch, wrap
from xmoe_fairseq_compat.settings import as_dict

logger = logging.getLogger(__name__)

SHOWN = 3  # names in a message: a choice
_words: list[str] = []  # of the command line that a script has made itself
SIZE = re.compile(
    r"size mismatch for (\S+): copying a param with shape (?:torch\.Size\()?(\[[^]]*\])\)? from checkpoint, "
    r"the shape in current model is (?:torch\.Size\()?(\[[^]]*\])"
)
NO_TENSOR = re.compile(r'While copying the parameter named "([^"]+)", expected torch\.Tensor')
VOCABULARY = re.compile(r"(embed_tokens|output_projection)\.weight$|\.embed_out$")
SHAPING = re.compile(
    r".*(_dim|_layers|_heads|_positions|_pos)|share_.*|.*normalize_before|.*layernorm_embedding|adaptive_.*"
)
# They change what a model computes, and no weight shows it.
SILENT = re.compile(
    r"activation_fn|(en|de)coder_(attention_heads|normalize_before)|no_scale_embedding"
    r"|no_token_positional_embeddings"
)


class WeightsError(UserError, RuntimeError):
    """Weights that do not fit a model."""


def misfit(message: str) -> str | None:
    """torch's page about a state dict in one line, with the first few names of each kind; None if it is
    about something else."""
    sizes = SIZE.findall(message)
    kinds = [("", [f"{name} is {saved}, not {wanted}" for name, saved, wanted in sizes])]
    kinds += [("", [f"{name} is no tensor" for name in NO_TENSOR.findall(message)])]
    for kind, text in (("Missing", "it has no "), ("Unexpected", "it has besides ")):
        found = re.search(rf"{kind} key\(s\) in state_dict: (.*)", message)
        kinds += [(text, re.findall(r'"([^"]+)"', found[1]) if found else [])]
    parts = [_first(names, text) for text, names in kinds if names]
    if not parts:
        return None
    is_vocabulary = len(parts) == 1 and sizes and all(VOCABULARY.search(name) for name, _, _ in sizes)
    hint = "; it was trained with another dictionary" if is_vocabulary else ""
    return f"its weights do not fit the model: {'; '.join(parts)}{hint}"


def _first(names: list[str], text: str) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return text + ", ".join(names[:SHOWN]) + more


def settings_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration, of a checkpoint; older ones have it among `args`."""
    cfg = state.get("cfg")
    return as_dict(cfg.get("model") if isinstance(cfg, Mapping) else None) or as_dict(state.get("args"))


@patch("fairseq.options")
def remember_what_a_script_asks_for(module: Any) -> None:
    """Every torch: a script may hand over the words of a command line, which `sys.argv` does not have."""

    @wrap(module, "parse_args_and_arch")
    def parse_args_and_arch(
        plain: Any, parser: Any, input_args: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        _words[:] = map(str, input_args or ())
        return plain(parser, input_args, *args, **kwargs)


def typed_words() -> list[str]:
    """Of the command line: what a script handed over, or what a user typed."""
    return _words or sys.argv[1:]


def check_left_out(
    path: Any, changed: Mapping[str, tuple[Any, Any]], instead: Mapping[str, str] | None = None
) -> None:
    """fairseq builds a model from the command line alone and fills it with a checkpoint's weights, so that a
    setting which was left out would silently be the default.

    Args:
        changed: settings of the model as (in the checkpoint, here); those that were typed may differ.
        instead: of some of them the setting that stands in its place here, whose value is given.

    Raises:
        CheckpointError: says what to type.
    """
    given = {word.split("=")[0].lstrip("+") for word in typed_words()}  # for fairseq-train, or for hydra
    left_out = sorted(name for name in changed if not {as_flag(name), f"model.{name}"} & given)
    if left_out:
        typed = hydras if os.path.basename(sys.argv[0]) == "fairseq-hydra-train" else as_flag
        keep = " ".join(typed(name, changed[name][0]) for name in left_out)
        change = " ".join(typed((instead or {}).get(name, name), changed[name][1]) for name in left_out)
        can_change = typed is hydras or not any(changed[name][1] is False for name in left_out)
        raise CheckpointError(
            path,
            "it was trained or converted with other settings than this run's, which its weights do not show;"
            f" add {keep} to keep them" + (f", or {change} to change them" if can_change else ""),
        )
    for name, (was, now) in changed.items():
        logger.warning(f"{path} was saved with {as_flag(name, was)}; from here on {as_flag(name, now)}")


def hydras(name: str, value: Any) -> str:
    """A setting of the model as it is typed for fairseq-hydra-train."""
    if not isinstance(value, str) or re.fullmatch(r"[\w.,:/+-]+", value):
        return f"++model.{name}={value}"
    escaped = value.replace('"', '\\"')
    return f"\"++model.{name}='{escaped}'\""


def as_flag(name: str, value: Any = True) -> str:
    """A setting as it is typed; one that is off cannot be, where an architecture has it on."""
    text = flag(name)
    if isinstance(value, bool):
        return text if value else f"an --arch without {text}"
    return f"{text} {shlex.quote(str(value))}"


def other_sizes(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The flags that give a model its sizes and differ: " (it was trained with --x 8, here 16; ...)"."""
    shaping = [SHAPING, *map(re.compile, plugins.shaping)]
    names = [name for name in saved if name in here and any(kind.fullmatch(name) for kind in shaping)]
    differing = [
        f"{as_flag(name, saved[name])}, here {here[name]}"
        for name in names
        if saved[name] != here[name] and None not in (saved[name], here[name])
    ]
    return f" (it was trained with {_first(differing, '')})" if differing else ""
