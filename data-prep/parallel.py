"""The same function on many items, on all cores, results in the items' order, few items in memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from textio import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
_function: Callable[[Any], Any]


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Like map. Workers are forks, so `function` may be a method of something large.

    An item should be work enough to be worth handing over: the CHUNKs of the scripts are choices.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), _install, (function, os.getpid()))
    waiting: deque[Future[Result]] = deque()
    try:
        with pool:
            try:
                for item in items:
                    waiting.append(pool.submit(_call, item))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:  # Ctrl-C too: what waits need not be done any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} processes was killed; out of memory? give fewer --workers"
        ) from None


def _install(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent says so

    def follow() -> None:  # a parent that is killed cannot tell its workers
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _call(item: Any) -> Any:
    return _function(item)
