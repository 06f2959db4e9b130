"""Checkpoints of a tiny model of stock fairseq, to be changed into ones that are meant to harm."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from xmoe_fairseq_compat.checkpoints import load_checkpoint
from xmoe_fairseq_compat.errors import CheckpointError

ARGUMENTS = (
    "data", "--task", "language_modeling", "--arch", "transformer_lm", "--decoder-embed-dim", "8",
    "--decoder-ffn-embed-dim", "8", "--decoder-layers", "1", "--decoder-attention-heads", "1",
    "--tokens-per-sample", "16", "--batch-size", "2", "--criterion", "cross_entropy", "--cpu",
)  # fmt: skip
Change = Callable[[dict[str, Any]], None]


def binarised(folder: Path) -> Path:
    """A data folder that has a dictionary, which is all that it takes to build a model."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dict.txt").write_text("a 3\nb 2\n")
    return folder / "data"


@functools.cache
def _configuration() -> dict[str, Any]:
    parser = options.get_training_parser()
    arguments = options.parse_args_and_arch(parser, list(ARGUMENTS))
    return OmegaConf.to_container(convert_namespace_to_omegaconf(arguments), resolve=True, enum_to_str=True)


def state(folder: Path) -> dict[str, Any]:
    """What fairseq-train would save after no update."""
    cfg = copy.deepcopy(_configuration())
    cfg["task"]["data"] = str(binarised(folder))
    loaded = OmegaConf.create(cfg)
    model = tasks.setup_task(loaded.task).build_model(loaded.model)
    history = {"num_updates": 0, "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}
    iterator = {"epoch": 1, "iterations_in_epoch": 0}
    return {
        "args": None, "cfg": cfg, "model": dict(model.state_dict()), "criterion": None,
        "optimizer_history": [history], "last_optimizer_state": None, "task_state": {},
        "extra_state": {"train_iterator": iterator},
    }  # fmt: skip


def checkpoint(folder: Path, change: Change = lambda state: None) -> Path:
    content = state(folder)
    change(content)
    path = folder / "hostile.pt"
    torch.save(content, path)
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)
