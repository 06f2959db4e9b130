"""A lock file that says which process saves into a folder."""

from __future__ import annotations

import errno
import json
import os
import socket
from typing import Any

from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.files import make_folder, named_in_errors

NAME = "train.lock"
# What a scheduler leaves as it is when it starts a run again, and what it counts up.
RESTARTS = (
    ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


class Lock:
    """Held until `release`, or until this process ends, however it ends.

    The system's lock on the file tells whether its process lives, on another machine too if the file system
    can. Forks do not inherit it: a data loader's worker that outlives a killed run holds nothing.
    """

    def __init__(self, path: str, file: int) -> None:
        self.path, self.file, self.process = path, file, os.getpid()

    def release(self) -> None:
        if os.getpid() == self.process:
            if os.path.exists(self.path):
                os.unlink(self.path)
            os.close(self.file)


def hold(save_dir: str) -> Lock:
    """
    Raises:
        FlagError: another run saves there, or may do so on another machine.
        WriteError: the folder cannot be made or written.
    """
    path = os.path.join(save_dir, NAME)
    while True:
        make_folder(save_dir)
        with named_in_errors(save_dir):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            check_owner(_owner(file), _is_locked(file), path)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                with named_in_errors(save_dir):
                    os.truncate(file, 0)
                    os.pwrite(file, json.dumps(_this_run()).encode(), 0)
                return Lock(path, file)
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the run that had it has just ended, and removed it


def check_owner(owner: dict[str, Any], is_locked: bool | None, path: str) -> None:
    """Raises FlagError if the run that wrote the file may still save there.

    Args:
        owner: what the file says; empty if nothing.
        is_locked: by another process; None if the file system has no locks.
    """
    here, folder = _this_run(), os.path.dirname(path)
    who = f"process {owner.get('process', 'unknown')} on {owner.get('host', 'unknown')}"
    is_local = owner.get("host") == here["host"]
    if is_locked or (is_locked is None and is_local and _lives(owner.get("process"))):
        raise FlagError(f"--save-dir {folder} is in use by {who}; end that run, or give another folder")
    is_restart = owner.get("job") == here["job"] is not None and owner.get("attempt") != here["attempt"]
    if owner and not is_local and not is_restart:
        raise FlagError(f"--save-dir {folder} was in use by {who}; if that run has ended, remove {path}")


def _this_run() -> dict[str, Any]:
    jobs = [os.environ.get(job, "none") for job, _ in RESTARTS]  # torchrun's is "none" if it was given none
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "job": None if set(jobs) == {"none"} else jobs,
        "attempt": [os.environ.get(attempt) for _, attempt in RESTARTS],
    }


def _owner(file: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:  # not ours; whose, nobody knows
        owner = {"host": "unknown"}
    return owner if isinstance(owner, dict) else {"host": "unknown"}


def _is_locked(file: int) -> bool | None:
    """By another process; if not, it is locked now by this one."""
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return False


def _lives(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True  # somebody else's
    except (OSError, TypeError, ValueError):
        return False
    return int(process) != os.getpid()
