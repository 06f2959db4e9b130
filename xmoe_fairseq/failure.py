"""Which rank failed, told by those that are left: they see no more than a lost connection."""

import os
import socket
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

PREFIX = "xmoe_fairseq"


def introduce() -> None:
    """Tell the others this rank's process, so that those on its machine can see whether it lives."""
    _get_default_store().set(f"{PREFIX}/process/{dist.get_rank()}", f"{_machine()} {os.getpid()}")


def explain(error: Exception, update: int, wait: float = 3.0) -> str:
    """What went wrong, and on which ranks.

    Every failing rank tells the others what it met. One that only lost its connections waits a moment for
    the others to do so. Those that say nothing are dead, or wait in an exchange for one that is: on the same
    machine that is looked up; of another machine's it is not known.

    Args:
        update: makes the messages of one failure distinct from those of an earlier one.
        wait: seconds; short, since a launcher soon ends the remaining ranks.
    """
    prefix, ranks = f"{PREFIX}/failed/{update}/", range(dist.get_world_size())
    lost_connection = isinstance(error, dist.DistError) or "gloo" in str(error)
    try:
        store = _get_default_store()
        store.set(f"{prefix}{dist.get_rank()}", "" if lost_connection else repr(error))
        if not lost_connection:
            return repr(error)
        silent, deadline = list(ranks), time.monotonic() + wait
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([f"{prefix}{rank}"])]
            time.sleep(0.05)  # a choice, as `wait` is
        messages = {rank: store.get(f"{prefix}{rank}").decode() for rank in ranks if rank not in silent}
        waiting = [rank for rank in silent if _is_running(store, rank)]
    except RuntimeError:  # the store is gone: with rank 0, or with the launcher
        return f"{error!r}; rank 0 or its launcher does not answer"
    parts = [f"lost connection ({error})"]
    parts += [f"rank {rank} failed: {message}" for rank, message in messages.items() if message]
    if waiting:
        parts.append(f"ranks {waiting} are running, and wait")
    if missing := [rank for rank in silent if rank not in waiting]:
        parts.append(f"no answer from ranks {missing}")
    return "; ".join(parts)


def _is_running(store: dist.Store, rank: int) -> bool:
    """Whether it is a living process of this machine; False if that is not known."""
    key = f"{PREFIX}/process/{rank}"
    if not store.check([key]):
        return False
    machine, _, pid = store.get(key).decode().rpartition(" ")
    if machine != _machine():
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # dead, though nobody has asked for its exit status yet


def _machine() -> str:
    """Within which a process number means one process: containers may share a name, or have numbers of their
    own."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}"
