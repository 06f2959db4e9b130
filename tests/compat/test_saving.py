"""Saving: whole files or none, one run to a folder, one line where it fails, on every rank."""

import errno
import json
import os
import resource
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.file_io import PathManager
from omegaconf import OmegaConf

from xmoe_fairseq_compat import folder_lock, saving
from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.files import WriteError, from_all_ranks, raise_on_all_ranks, write_atomically


def limited(size: int, function: Callable[[], Any]) -> str:
    """The error of a function whose files may have so many bytes: as on a full disk."""

    def rank() -> str:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        with pytest.raises(WriteError) as error:
            function()
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # for what it returns
        return str(error.value)

    return run_ranks(1, rank)[0]


def test_a_write_that_fails_names_file_and_reason_and_leaves_the_old_file(tmp_path: Path) -> None:
    """write_checkpoints_whole_or_not"""
    path = tmp_path / "checkpoint_last.pt"
    checkpoint_utils.torch_persistent_save({"model": {"w": torch.ones(3)}}, str(path))
    large = {"model": {"w": torch.ones(10_000)}}
    said = limited(20_000, lambda: checkpoint_utils.torch_persistent_save(large, str(path)))
    assert said == f"cannot write {path}: file too large"
    assert torch.load(path)["model"]["w"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["checkpoint_last.pt"]


def test_a_copy_that_fails_likewise(tmp_path: Path) -> None:
    """copy_checkpoints_whole"""
    source, target = tmp_path / "checkpoint_1_2.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(bytes(3000))
    target.write_bytes(b"old")
    copy = checkpoint_utils.PathManager.copy
    assert limited(1000, lambda: copy(str(source), str(target), overwrite=True)).endswith("file too large")
    assert target.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    assert copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == bytes(3000)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_the_reason_is_the_system_s(number: int, tmp_path: Path) -> None:
    def write(file: Any) -> None:
        file.write(b"a part")
        raise OSError(number, os.strerror(number))

    with pytest.raises(WriteError, match=os.strerror(number)[1:]) as error:
        write_atomically(tmp_path / "file", write)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


def test_other_errors_stay_what_they_are_and_leave_nothing(tmp_path: Path) -> None:
    def write(file: Any) -> None:
        raise RuntimeError("not the disk's")

    with pytest.raises(RuntimeError, match="not the disk's"):
        write_atomically(tmp_path / "file", write)
    with pytest.raises(WriteError, match="it is a file, not a folder"):
        write_atomically(Path(__file__) / "file", write)
    assert not os.listdir(tmp_path)


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    def rank() -> str:
        here = from_all_ranks(None).index(None)  # 0, on any rank
        me = torch.distributed.get_rank()
        raise_on_all_ranks(None)
        with pytest.raises(UserError) as error:
            raise_on_all_ranks(WriteError("file", "No space left on device") if me == here + 1 else None)
        return str(error.value)

    line = "cannot write file: no space left on device"
    assert run_ranks(3, rank) == [f"{line} (said by rank 1)", line, f"{line} (said by rank 1)"]


def test_saving_that_fails_on_one_rank_is_said_on_all(tmp_path: Path) -> None:
    """say_on_all_ranks_that_saving_failed"""

    def rank() -> str:
        me = torch.distributed.get_rank()

        def save(filename: str, extra_state: Any) -> None:
            raise WriteError(filename, "No space left on device")

        trainer = SimpleNamespace(
            data_parallel_rank=me, consolidate_optimizer=lambda: None, checkpoint_suffix="",
            should_save_checkpoint_on_current_rank=me == 0, get_num_updates=lambda: 3, save_checkpoint=save,
            always_call_state_dict_during_save_checkpoint=False,
        )  # fmt: skip
        epoch = SimpleNamespace(epoch=1, end_of_epoch=lambda: True, state_dict=dict)
        cfg = checkpoint_utils.CheckpointConfig(save_dir=str(tmp_path), save_interval_updates=0)
        with pytest.raises(UserError) as error:
            checkpoint_utils.save_checkpoint(cfg, trainer, epoch, None)
        return str(error.value)

    line = f"cannot write {tmp_path}/checkpoint1.pt: no space left on device"
    assert run_ranks(2, rank) == [line, f"{line} (said by rank 0)"]


def holder(folder: str, told: Any) -> None:
    folder_lock.hold(folder)
    told.send("held")
    told.recv()


def test_a_folder_belongs_to_one_process_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    here, there = Pipe()
    other = get_context("fork").Process(target=holder, args=(str(tmp_path), there))
    other.start()
    assert here.recv() == "held"
    line = (
        f"--save-dir {tmp_path} is in use by process {other.pid} on .*; end that run, or give another folder"
    )
    with pytest.raises(FlagError, match=line):
        folder_lock.hold(str(tmp_path))
    other.kill()
    other.join()
    assert os.listdir(tmp_path) == [folder_lock.NAME]  # it had no time to remove it
    lock = folder_lock.hold(str(tmp_path))
    assert json.loads((tmp_path / folder_lock.NAME).read_text())["process"] == os.getpid()
    lock.release()
    assert not os.listdir(tmp_path)


def test_what_another_machine_left_is_named_and_not_removed(tmp_path: Path) -> None:
    path = str(tmp_path / folder_lock.NAME)
    elsewhere = {"host": "elsewhere", "process": 7}
    with pytest.raises(FlagError, match=f"in use by process 7 on elsewhere; .*, remove {path}"):
        folder_lock.check_owner(elsewhere, False, path)
    with pytest.raises(FlagError, match="by process unknown on unknown"):
        folder_lock.check_owner({"host": "unknown"}, None, path)
    folder_lock.check_owner({}, None, path)


def test_a_job_that_a_scheduler_starts_again_may_go_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / folder_lock.NAME)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    before = {**folder_lock._this_run(), "host": "elsewhere"}
    with pytest.raises(FlagError, match="on elsewhere"):  # another run of the same job
        folder_lock.check_owner(before, False, path)
    for counter in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        with monkeypatch.context() as again:
            again.setenv(counter, "1")
            folder_lock.check_owner(before, False, path)
            again.setenv("SLURM_JOB_ID", "13")
            with pytest.raises(FlagError, match="on elsewhere"):
                folder_lock.check_owner(before, False, path)


def test_without_locks_of_the_file_system_the_process_is_looked_for(tmp_path: Path) -> None:
    path = str(tmp_path / folder_lock.NAME)
    alive = {**folder_lock._this_run(), "process": os.getppid()}
    with pytest.raises(FlagError, match=f"in use by process {os.getppid()}"):
        folder_lock.check_owner(alive, None, path)
    folder_lock.check_owner({**alive, "process": 2**22 + 1}, None, path)  # more than there are


@pytest.mark.parametrize("no_save", [False, True])
def test_a_run_holds_its_folder_unless_it_saves_nothing(no_save: bool, tmp_path: Path) -> None:
    """one_run_to_a_folder"""
    module = SimpleNamespace(main=lambda cfg: list(tmp_path.rglob("*")))
    saving.one_run_to_a_folder(module)
    seen = module.main(configuration(save_dir=str(tmp_path / "run"), no_save=no_save))
    assert (tmp_path / "run" / folder_lock.NAME in seen) == (not no_save)
    assert not list(tmp_path.rglob(folder_lock.NAME))


def configuration(**settings: Any) -> Any:
    return OmegaConf.merge(OmegaConf.structured(FairseqConfig), {"checkpoint": settings})


def test_a_folder_that_may_not_be_written_is_named() -> None:
    module = SimpleNamespace(main=lambda cfg: pytest.fail("it trains"))
    saving.one_run_to_a_folder(module)
    with pytest.raises(WriteError, match=f"cannot write {__file__}/run: not a directory"):
        module.main(configuration(save_dir=f"{__file__}/run"))


def test_writing_in_the_background_is_refused() -> None:
    """refuse_to_write_in_the_background"""
    module = SimpleNamespace(main=lambda cfg: pytest.fail("it trains"))
    saving.refuse_to_write_in_the_background(module)
    with pytest.raises(FlagError, match="--write-checkpoints-asynchronously writes damaged"):
        module.main(configuration(write_checkpoints_asynchronously=True))
    assert PathManager.supports_rename("checkpoint.pt")
