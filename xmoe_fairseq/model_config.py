"""A model's configuration as one complete flat namespace, wherever fairseq got it from."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models.transformer import TransformerConfig
from omegaconf import II, DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from xmoe_fairseq.config import read_field
from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.override_rules import did_you_mean


def complete_namespace(cfg: Any, dataclass: type[FairseqDataclass], task: Any) -> Namespace:
    """Every field of `dataclass`, from `cfg` (DictConfig or Namespace) where it has one, else the default.

    fairseq itself merges the defaults only if the architecture is named like the model: with a sized
    architecture, fairseq-hydra-train hands over just what was typed, and a checkpoint just what the
    version that wrote it knew. A copy, so that fairseq's `build_model` may write to it.

    Raises:
        FlagError: hydra's `+model.moe_...` names no flag; it takes any name.
    """
    given = {name: _get(cfg, name) for name in cfg} if OmegaConf.is_config(cfg) else vars(cfg)
    if OmegaConf.is_config(cfg):  # a namespace holds the flags of the criterion too
        _check_names(given, {f.name for f in fields(dataclass)})
    values = {f.name: read_field(given, f.name, _default(f)) for f in fields(dataclass)}
    return Namespace(**given | {name: _resolve(value, values, task) for name, value in values.items()})


def _check_names(given: Iterable[str], known: set[str]) -> None:
    for name in given:
        if name.startswith("moe_") and name not in known:
            hint = did_you_mean(name, known) or f"; of a criterion: +criterion.{name}"
            raise FlagError(f"+model.{name}: the model has no setting {name}{hint}")


def _get(cfg: DictConfig, name: str) -> Any:
    try:
        return cfg[name]
    except InterpolationKeyError:  # fairseq merged it; it refers to fields that are not around it
        return OmegaConf.to_container(cfg)[name]  # type: ignore[call-overload, index]


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _resolve(value: Any, values: dict[str, Any], task: Any) -> Any:
    """Follow a default like ${task.tokens_per_sample} or ${model.encoder_embed_dim}."""
    if not (isinstance(value, str) and value.startswith("${")):
        return value
    group, _, name = value[2:-1].partition(".")
    if group == "model":
        return _resolve(values[name], values, task)
    # Some of fairseq's tasks keep their configuration in `args`.
    return getattr(getattr(task, "cfg", None) or task.args, name, None) if group == "task" else None


def flat_transformer_config(name: str, base: type[FairseqDataclass]) -> type[FairseqDataclass]:
    """TransformerConfig's nested fields under their command-line names (encoder.layers -> encoder_layers).

    fairseq parses the nested dataclass only for its own argparse-based `transformer`; a registered
    dataclass must be flat.
    """
    renamed = []
    for f in fields(TransformerConfig):
        inner = fields(f.type) if isinstance(f.type, type) and issubclass(f.type, FairseqDataclass) else None
        for leaf in [f] if inner is None else inner:
            if leaf.name != "_name":
                full_name = leaf.name if inner is None else f"{f.name}_{leaf.name}"
                renamed.append((full_name, _TYPES.get(leaf.name, leaf.type), _flat_field(full_name, leaf)))
    return make_dataclass(name, renamed, bases=(base,))


_TYPES = {"layers_to_keep": Optional[str]}  # noqa: UP045  (fairseq: List[int], then splits a string)
_SAME_AS = {
    "decoder_embed_dim": "encoder_embed_dim",
    "decoder_ffn_embed_dim": "encoder_ffn_embed_dim",
    "decoder_input_dim": "decoder_embed_dim",
    "decoder_output_dim": "decoder_embed_dim",
}


def _flat_field(full_name: str, leaf: Field[Any]) -> Any:
    default = II(f"model.{_SAME_AS[full_name]}") if full_name in _SAME_AS else _default(leaf)
    metadata = dict(leaf.metadata)
    if full_name != leaf.name and "help" in metadata:
        metadata["help"] = f"{full_name.split('_')[0]}: {metadata['help']}"
    return field(default=default, metadata=metadata)
