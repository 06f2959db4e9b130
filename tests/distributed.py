"""Runs a function on several real processes (gloo on CPU), with a deadline."""

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from commands import DEADLINE


def run_ranks(world_size: int, function: Callable[[], Any], timeout: float = DEADLINE) -> list[Any]:
    """What `function()` returns on each rank; None for a rank that left without a word.

    The processes are forks, so that torch need not be imported again and `function` may be a closure. With
    one rank there is no process group, as in a plain fairseq command.

    Raises:
        AssertionError: a rank failed (with its traceback), or some did not end in time (with their numbers).
    """
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        ranks = [
            fork.Process(target=_rank, args=(rank, world_size, function, Path(folder), timeout), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n".join(errors)
        assert not hung, f"ranks {hung} of {world_size} did not end within {timeout} s"
        results = [Path(folder, f"{rank}.pt") for rank in range(world_size)]
        return [torch.load(path, weights_only=True) if path.exists() else None for path in results]


def _rank(rank: int, world_size: int, function: Callable[[], Any], folder: Path, timeout: float) -> None:
    torch.set_num_threads(1)  # a fork of a process that has used OpenMP's threads hangs with more
    gc.freeze()  # or a collection would touch, and so copy, all that the parent has imported
    try:
        if world_size > 1:
            init = f"file://{folder}/rendezvous"
            dist.init_process_group(
                "gloo", init, timedelta(seconds=timeout), world_size=world_size, rank=rank
            )
            # A rank that was connected, had nothing to send and left would cut off others still connecting.
            dist.barrier()
        torch.save(function(), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
    finally:
        os._exit(0)  # the parent judges by the files; pytest's own clean-up is not for a fork
