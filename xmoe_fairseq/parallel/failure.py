"""Which rank failed, told by those that are left: they see no more than a lost connection."""

import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


def explain(error: Exception, update: int, wait: float = 3.0) -> str:
    """What went wrong, and on which ranks.

    Every failing rank tells the others what it met. One that only lost its connections waits a moment for
    the others to do so; those that say nothing are dead or stuck.

    Args:
        update: makes the messages of one failure distinct from those of an earlier one.
        wait: seconds; short, since a launcher soon ends the remaining ranks.
    """
    prefix, ranks = f"xmoe_fairseq/failed/{update}/", range(dist.get_world_size())
    lost_connection = isinstance(error, dist.DistError) or "gloo" in str(error)
    try:
        store = _get_default_store()
        store.set(f"{prefix}{dist.get_rank()}", "" if lost_connection else repr(error))
        if not lost_connection:
            return repr(error)
        silent, deadline = list(ranks), time.monotonic() + wait
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([f"{prefix}{rank}"])]
            time.sleep(0.05)
        messages = {rank: store.get(f"{prefix}{rank}").decode() for rank in ranks if rank not in silent}
    except RuntimeError:  # the store is gone: with rank 0, or with the launcher
        return f"{error!r}; rank 0 or its launcher does not answer"
    told = [f"rank {rank} failed: {message}" for rank, message in messages.items() if message]
    return "; ".join(
        [f"lost connection ({error})", *told, *([f"no answer from ranks {silent}"] if silent else [])]
    )
