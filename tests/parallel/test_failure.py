"""One rank fails: the others end too, say where, and torchrun starts again from the last checkpoint."""

import logging
import os
import re
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from commands import TINY_LM, TRAIN, run_anew
from distributed import run_ranks
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.tasks import FairseqTask
from parallel_runs import EXACT, MT, fairseq_train

from xmoe_fairseq.parallel.trainer import ExpertParallelTrainer
from xmoe_fairseq_compat.errors import UserError

MESSAGES = {
    "dies": "",
    "runs out of memory": "RuntimeError('out of memory')",
    "meets a NaN": "FloatingPointError('NaN')",
}


def last_words(data: Path, folder: Path, size: int = 2) -> str:
    """What this rank logs when a training with a checkpoint after 2 updates fails."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("xmoe_fairseq").addHandler(handler)
    with pytest.raises((RuntimeError, FloatingPointError, UserError)):
        fairseq_train(
            data, *MT, *EXACT, "--max-update", 4, "--ddp-backend", "legacy_ddp", "--save-interval-updates", 2,
            "--moe-expert-parallel-size", size, "--disable-validation", "--save-dir", folder,
        )  # fmt: skip
    return messages[-1]


@pytest.mark.parametrize("how, size", [*((how, 2) for how in MESSAGES), ("dies", 1)])
def test_others_end_and_say_who_is_missing(
    how: str, size: int, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    """fairseq would retry, or save a crash checkpoint, on that rank alone; the others would wait."""
    plain_step = FairseqTask.train_step

    def step(self: Any, update_num: int, **kwargs: Any) -> Any:
        if dist.get_rank() == 1 and update_num == 2:
            if how == "dies":
                os._exit(1)
            raise RuntimeError("out of memory") if how == "runs out of memory" else FloatingPointError("NaN")
        return plain_step(self, update_num=update_num, **kwargs)

    def ranks() -> str:
        with patch.object(FairseqTask, "train_step", step):
            return last_words(corpus[0], tmp_path, size)

    first, second = run_ranks(2, ranks)
    assert first.startswith("rank 0 of 2, update 3: ")
    if how == "dies":
        assert first.endswith("no answer from ranks [1]")
        assert second is None
    else:
        assert f"; rank 1 failed: {MESSAGES[how]}" in first
        assert second == f"rank 1 of 2, update 3: {MESSAGES[how]}"
    assert not (tmp_path / "crash.pt").exists()


@pytest.mark.parametrize("when", ["first batch", "later"])
def test_data_that_one_rank_cannot_read(when: str, corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """Its own line, and what the others say, name the rank and the files."""
    plain_item = MMapIndexedDataset.__getitem__

    def item(self: Any, index: int) -> Any:
        is_later = threading.current_thread() is not threading.main_thread()  # fairseq reads ahead
        if dist.get_rank() == 1 and "/train." in self._path and is_later == (when == "later"):
            raise OSError("no such block")
        return plain_item(self, index)

    def ranks() -> str:
        with patch.object(MMapIndexedDataset, "__getitem__", item):
            return last_words(corpus[0], tmp_path, 1)

    first, second = run_ranks(2, ranks)
    files = ", ".join(str(corpus[0] / f"train.en-de.{language}") for language in ("en", "de"))
    said = f"UserError('rank 1 of 2: cannot read a batch of {files}: OSError: no such block')"
    assert second == f"rank 1 of 2, update 1: {said}"
    assert first.endswith(f"; rank 1 failed: {said}")


def test_ranks_that_wait_are_not_taken_for_dead(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """Rank 3 loses its partner at once; rank 0 waits for ranks that wait for the dead one."""
    plain_step = FairseqTask.train_step

    def step(self: Any, update_num: int, **kwargs: Any) -> Any:
        if dist.get_rank() == 2 and update_num == 2:
            os._exit(1)
        return plain_step(self, update_num=update_num, **kwargs)

    def ranks() -> str:
        with patch.object(FairseqTask, "train_step", step):
            return last_words(corpus[0], tmp_path, 2)

    said = run_ranks(4, ranks)
    assert said[2] is None
    for rank in (0, 1, 3):
        assert said[rank].startswith(f"rank {rank} of 4, update 3: lost connection (")
        assert said[rank].endswith("no answer from ranks [2]")


def test_a_death_while_saving_is_named_too(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    plain_gather = ExpertParallelTrainer._gather

    def gather(self: Any) -> Any:
        if dist.get_rank() == 1:
            os._exit(1)
        return plain_gather(self)

    def ranks() -> str:
        with patch.object(ExpertParallelTrainer, "_gather", gather):
            return last_words(corpus[0], tmp_path)

    first, second = run_ranks(2, ranks)
    assert first.startswith("rank 0 of 2, saving after update 2: ")
    assert first.endswith("no answer from ranks [1]")
    assert second is None


# An epoch has 3 updates. Rank 0, which has written the checkpoint after update 6, took part in the 7th.
TRAIN_AND_DIE = """
import os, signal
from fairseq.tasks import FairseqTask
from fairseq_cli.train import cli_main
plain_step = FairseqTask.train_step
def step(self, *args, update_num, **kwargs):
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], update_num) == ("1", "0", 7):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain_step(self, *args, update_num=update_num, **kwargs)
FairseqTask.train_step = step
cli_main()
"""


def test_torchrun_goes_on_after_a_rank_was_killed(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    script = tmp_path / "train_and_die.py"
    script.write_text(TRAIN_AND_DIE)
    output = run_anew(
        "torchrun", "--nproc_per_node", 2, "--max-restarts", 2, "--standalone",
        script, corpus[1], *TINY_LM, *TRAIN, "--distributed-backend", "gloo",
        "--moe-expert-parallel-size", 2, "--max-update", 12, "--save-interval-updates", 5,
        "--keep-interval-updates", 2, "--disable-validation", "--save-dir", tmp_path,
    )  # fmt: skip
    assert re.search(r"Loaded checkpoint .*checkpoint_last.pt .* @ 6 updates", output)
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert state["optimizer_history"][-1]["num_updates"] == 12
    assert len(list(tmp_path.glob("checkpoint_*_*.pt"))) <= 2
