"""Log lines that a person can read: few statistics in one, and the configuration in a file."""

from __future__ import annotations

import logging
import os
import re
from argparse import Namespace
from typing import Any

from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.files import write_atomically
from xmoe_fairseq_compat.registry import patch, wrap
from xmoe_fairseq_compat.settings import as_dict, configuration

NAME = "config.yaml"  # in --save-dir or --results-path
TRAIN = "fairseq_cli.train"
GENERATE = "fairseq_cli.generate"


@patch("fairseq.logging.progress_bar")
def show_few_statistics(module: Any) -> None:
    """Every torch: a line has all the statistics that a criterion logs, however many.

    Those in JSON, and what TensorBoard and the like get, go another way.
    """

    @wrap(module.BaseProgressBar, "_format_stats")
    def _format_stats(plain: Any, self: Any, stats: Any) -> Any:
        hidden = re.compile("|".join(plugins.unshown) or "(?!)")
        return plain(self, {key: value for key, value in stats.items() if not hidden.fullmatch(key)})


def as_yaml(cfg: Any) -> str:
    """Of fairseq's configuration, parts of which may be what argparse has parsed; references as they are."""
    import yaml

    def plain(part: Any) -> Any:
        if isinstance(part, (Namespace, dict)):
            return {str(name): plain(value) for name, value in as_dict(part).items()}
        if isinstance(part, (list, tuple)):
            return [plain(value) for value in part]
        # Exactly these: an enum's member may be a string, too.
        return part if part is None or type(part) in (bool, int, float, str) else str(part)

    text: str = yaml.safe_dump(plain(as_dict(cfg)), sort_keys=False, allow_unicode=True)
    return text


def saved_as(cfg: Any) -> str:
    """Where a training notes its configuration, "" if it saves nothing."""
    return "" if cfg.checkpoint.no_save else os.path.join(cfg.checkpoint.save_dir, NAME)


def keep(cfg: Any, command: str, told: Any) -> str:
    """Write what a command tells of its configuration to a file, or leave that to `note_the_configuration`.

    Args:
        cfg: the command's own.

    Returns:
        What the log says in its place.

    Raises:
        OSError, WriteError.
    """
    file = cfg.common.log_file
    if file:
        with open(file, "a", encoding="utf-8") as log:
            log.write(as_yaml(told))
    elif command == TRAIN:
        file = saved_as(cfg)
    elif command == GENERATE and cfg.common_eval.results_path:
        file = os.path.join(cfg.common_eval.results_path, NAME)
        write_atomically(file, as_yaml(told))
    return f"configuration: {file or 'not shown; --log-file FILE writes it there'}"


@patch(TRAIN, GENERATE, *(f"fairseq_cli.{command}" for command in ("eval_lm", "interactive", "validate")))
def move_the_configuration(module: Any) -> None:
    """Every torch: a command begins with all its settings in one line of 6 kB."""
    logger = logging.getLogger(module.__name__)

    @wrap(module, "main")
    def main(plain: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        from omegaconf import OmegaConf

        cfg = configuration(cfg)

        def move(record: logging.LogRecord) -> bool:
            if plugins.brief and OmegaConf.is_config(record.msg):
                record.msg = keep(cfg, module.__name__, record.msg)
            return True

        logger.addFilter(move)
        try:
            return plain(cfg, *args, **kwargs)
        finally:
            logger.removeFilter(move)


@patch(TRAIN)
def note_the_configuration(module: Any) -> None:
    """Every torch: the settings of a run are in its log alone. Written once it trains: what is refused before
    must not take the place of what the folder's run was trained with."""

    @wrap(module, "train")
    def train(plain: Any, cfg: Any, *args: Any) -> Any:
        file, is_master = saved_as(cfg), module.distributed_utils.is_master(cfg.distributed_training)
        if plugins.brief and file and is_master and not cfg.common.log_file:
            write_atomically(file, as_yaml(cfg))
        return plain(cfg, *args)
