"""Patches of ranks.py that need no ranks."""

import logging
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from omegaconf import OmegaConf
from toy import encoder_layer

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.ranks import unreadable


def test_what_could_not_be_read_is_the_last_line_of_a_workers_traceback() -> None:
    error = OSError(
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nOSError: no such block\n'
    )
    assert str(unreadable(error, [])) == "cannot read a batch of the data: OSError: no such block"
    assert str(unreadable(EOFError(), [])) == "cannot read a batch of the data: EOFError: EOFError()"


def test_an_error_that_names_its_file_stays() -> None:
    assert str(unreadable(UserError("train.bin is damaged"), [])) == "train.bin is damaged"


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    """A gloo group of this process alone."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch's, which names the rank, would stay
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_ddp_on_cpu_does_not_wait_for_unused_weights(group: dist.ProcessGroup) -> None:
    layer = encoder_layer()
    trainable = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ddp = distributed_fairseq_model.DistributedDataParallel(layer, device_ids=[0], process_group=group)
    for _ in range(2):
        ddp(torch.ones(3, 1, 8), None).sum().backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == trainable


def test_gather_on_cpu(group: dist.ProcessGroup) -> None:
    large = {"loss": 1.5, "ids": list(range(20_000))}
    assert distributed_utils.all_gather_list(large, group, max_size=16384) == [large]


def ranks_of(**given: Any) -> Any:
    cfg = OmegaConf.structured(FairseqConfig())
    cfg.model = None
    OmegaConf.update(cfg, "distributed_training", {"distributed_world_size": 1, **given})
    return cfg


@pytest.mark.parametrize("heartbeat, minutes", [(-1, 30), (60, 30), (7200, 120)])
def test_all_groups_wait_as_long_as_the_flag_says(
    heartbeat: int, minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(distributed_utils, "dist", distributed_utils.dist)
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    how = {"distributed_backend": "gloo", "distributed_init_method": f"file://{tmp_path}/ranks"}
    distributed_utils.distributed_init(ranks_of(heartbeat_timeout=heartbeat, **how))
    try:
        for group in (dist.group.WORLD, distributed_utils.new_groups([[0]])):
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=minutes)
    finally:
        dist.destroy_process_group()


def test_nccl_is_told_which_gpu_a_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def init_process_group(*args: Any, **how: Any) -> None:
        asked.update(how)
        raise InterruptedError

    monkeypatch.setattr(distributed_utils, "dist", distributed_utils.dist)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(InterruptedError):
        distributed_utils.distributed_init(ranks_of(distributed_init_method="env://"))
    assert asked["device_id"] == torch.device("cuda", 3) and asked["timeout"] == timedelta(minutes=30)
