"""fairseq-train, with a count of what its ranks send to each other and how long they take over it.

    torchrun --nproc_per_node 2 scripts/run.py experiments.count_traffic RESULT.json ARGUMENTS ...

Rank 0 writes RESULT.json: bytes and messages per update that a rank sends to others, as rows, choices and
counts (all-to-all) and in reductions (all-reduce, as a ring sends them), seconds in each (waiting for slower
ranks included), and the seconds of an update; the first updates, which warm up, are left out.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import comb
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main
from torch import Tensor

from benchmarks.timing import finish_device
from experiments.results import write_json

WARM_UP = 5  # updates
bytes_sent, messages, seconds, counted = (defaultdict[str, float](float) for _ in range(4))


def expected_bytes(
    k: int, num_experts: int, num_ranks: int, width: int, itemsize: int, tokens: int = 1
) -> dict[str, float]:
    """That a rank sends to others in one MoE layer, forward and backward, if choices spread evenly: a row for
    each token and rank that has some of its k experts (docs/scaling.md)."""
    missed = comb(num_experts - num_experts // num_ranks, k) / comb(num_experts, k)  # a rank has none of them
    others = tokens * (num_ranks - 1)
    return {
        "rows": 4 * others * (1 - missed) * width * itemsize,
        "choices": 12 * others * k / num_ranks,  # row and weight, 4 bytes each; a gradient, 4
        "counts": 8 * (num_experts / num_ranks + 1) * (num_ranks - 1),
    }


def timed(collective: Callable[..., Any], sent: Callable[..., tuple[str, float]]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        finish_device()
        start = time.perf_counter()
        result = collective(*args, **kwargs)
        finish_device()
        what, size = sent(*args, **kwargs)
        seconds[what] += time.perf_counter() - start
        bytes_sent[what] += size
        messages[what] += 1
        return result

    return call


def sent_to_others(
    output: Tensor, rows: Tensor, receive: Any = None, send: Any = None, group: Any = None
) -> tuple[str, float]:
    if send is None:  # the same for every rank
        return "counts", rows.nbytes * (1 - 1 / dist.get_world_size(group))
    row = rows.size(-1) * rows.element_size()
    return "rows" if rows.size(-1) > 2 else "choices", float((sum(send) - send[dist.get_rank(group)]) * row)


def ring(tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> tuple[str, float]:
    ranks = dist.get_world_size(group)
    return "reductions", 2 * (ranks - 1) / ranks * tensor.nbytes


@contextmanager
def counting() -> Iterator[None]:
    """Fills `bytes_sent`, `messages` and `seconds`."""
    with (
        patch.object(dist, "all_to_all_single", timed(dist.all_to_all_single, sent_to_others)),
        patch.object(dist, "all_reduce", timed(dist.all_reduce, ring)),
    ):
        yield


def count_updates(plain: Callable[..., Any]) -> Callable[..., Any]:
    def train_step(self: Trainer, samples: list[Any], raise_oom: bool = False) -> Any:
        if self.get_num_updates() == WARM_UP:
            for counter in (bytes_sent, messages, seconds, counted):
                counter.clear()
        start = time.perf_counter()
        output = plain(self, samples, raise_oom)
        seconds["update"] += time.perf_counter() - start
        counted["updates"] += 1
        counted["tokens"] += sum(sample["ntokens"] for sample in samples if sample)
        return output

    return train_step


def main() -> None:
    target = Path(sys.argv.pop(1))
    Trainer.train_step = count_updates(Trainer.train_step)
    with counting():
        cli_main()
    if not dist.is_initialized() or dist.get_rank() == 0:
        count = counted["updates"]
        result: dict[str, Any] = {
            "tokens_per_update": counted["tokens"] / count,
            "seconds_per_update": seconds.pop("update") / count,
        }
        sums = {"bytes_sent": bytes_sent, "messages": messages, "seconds": seconds}
        result |= {name: {what: value / count for what, value in of.items()} for name, of in sums.items()}
        write_json(target, result)


if __name__ == "__main__":
    main()
