"""Settings in the several forms in which fairseq keeps them."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from typing import Any

from xmoe_fairseq_compat.registry import wrap


def as_dict(cfg: Any) -> dict[str, Any]:
    """Those of a DictConfig (references as they are), a Namespace, a dictionary or a dataclass; none of
    anything else."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
    if isinstance(cfg, Namespace) or dataclasses.is_dataclass(cfg):
        return vars(cfg)
    return dict(cfg) if isinstance(cfg, Mapping) else {}


def configuration(cfg: Any) -> Any:
    """The configuration that a command's main is called with: a program may give it parsed flags."""
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    return convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg


def when_parsed(options: Any, see: Callable[[Namespace, ArgumentParser], None]) -> None:
    """Have `see` look at all that fairseq.options parses, and at the parser that knows the flags."""

    @wrap(options, "parse_args_and_arch")
    def parse_args_and_arch(plain: Any, parser: Any, *args: Any, **kwargs: Any) -> Any:
        parsed = plain(parser, *args, **kwargs)
        see(parsed[0] if isinstance(parsed, tuple) else parsed, parser)
        return parsed
