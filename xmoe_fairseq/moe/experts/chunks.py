"""Which rows are computed together, and by which thread."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# Rows of experts that are gathered together: few enough for the cache, enough to hide the cost of a call.
CHUNK_ROWS = 256  # docs/performance.md, Tried
# Multiply-adds of one product, and rows that take as long as reading an expert's weights: below this an
# expert is computed sooner than Python can start another thread's next product.
THREAD_WORK, WEIGHTS_AS_ROWS = 2**21, 32  # docs/performance.md, Tried

Result = TypeVar("Result")


class Chunk(NamedTuple):
    experts: list[int]  # that have rows
    counts: list[int]  # rows of each
    rows: slice  # all of them

    def of(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Each expert's part of the chunk's rows."""
        parts: tuple[Tensor, ...] = rows.split(self.counts)
        return parts


def shares_of(counts: list[int], weights_of_expert: int, threads: int) -> list[list[Chunk]]:
    """Each thread's chunks; one share, which may be empty, if sharing would not pay.

    An expert's products are too small to be shared among threads, so whole experts are.

    Args:
        counts: rows of each expert.
        weights_of_expert: numbers in one of its two matrices, D x F.
    """
    rows, busy = sum(counts), sum(count > 0 for count in counts)
    work = (rows / max(busy, 1) + WEIGHTS_AS_ROWS) * weights_of_expert
    threads = min(threads, busy) if work >= THREAD_WORK else 1
    if threads < 2:
        return [list(chunks(counts, CHUNK_ROWS))]
    shares: list[list[Chunk]] = [[] for _ in range(threads)]
    for chunk in chunks(counts, min(CHUNK_ROWS, -(-rows // threads))):
        shares[(chunk.rows.start + chunk.rows.stop) * threads // (2 * rows)].append(chunk)  # by its middle
    return [share for share in shares if share]


def chunks(counts: list[int], limit: int) -> Iterator[Chunk]:
    """Experts in order, as many as have `limit` rows together; at least one."""
    experts: list[int] = []
    sizes: list[int] = []
    start = 0
    for expert, count in enumerate(counts):
        if experts and count and sum(sizes) + count > limit:
            yield Chunk(experts, sizes, slice(start, start := start + sum(sizes)))
            experts, sizes = [], []
        if count:
            experts, sizes = [*experts, expert], [*sizes, count]
    if experts:
        yield Chunk(experts, sizes, slice(start, start + sum(sizes)))


def buffer_for(like: Tensor, share: list[Chunk]) -> Tensor:
    """Room for any one chunk: the same for all, so that it stays in the cache."""
    return like.new_empty(max((sum(chunk.counts) for chunk in share), default=0), like.size(1))


def compute(work: Callable[[list[Chunk]], Result], shares: list[list[Chunk]]) -> list[Result]:
    """Each share's result, in order; one thread per share, and none of them starts further ones."""
    if len(shares) == 1:
        return [work(shares[0])]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        others = [_pool(os.getpid(), len(shares)).submit(_alone, work, share) for share in shares[1:]]
        try:
            first = work(shares[0])
        finally:
            rest = [other.result() for other in others]
    finally:
        torch.set_num_threads(threads)
    return [first, *rest]


def _alone(work: Callable[[list[Chunk]], Result], share: list[Chunk]) -> Result:
    """A thread has a grad mode and a number of threads of its own, whatever its parent's are.

    Set here and not when the thread starts: that may be after the caller has set the number back for all.
    """
    torch.set_num_threads(1)
    with torch.no_grad():
        return work(share)


@cache
def _pool(process: int, size: int) -> ThreadPoolExecutor:
    """Of this process: a forked one has none of its parent's threads."""
    return ThreadPoolExecutor(size - 1, "experts")
