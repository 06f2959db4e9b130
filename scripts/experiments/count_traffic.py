"""fairseq-train, with a count of what its ranks send to each other and how long they take over it.

    torchrun --nproc_per_node 2 scripts/run.py experiments.count_traffic RESULT.json ARGUMENTS ...

Rank 0 writes RESULT.json: bytes per update that a rank sends to others in exchanges of rows (all-to-all) and
in reductions (all-reduce, as a ring sends them), seconds in each (waiting for slower ranks included), and
the seconds of an update; the first updates, which warm up, are left out.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main
from torch import Tensor

from benchmarks.timing import finish_device
from experiments.results import write_json

WARM_UP = 5  # updates
bytes_sent, seconds, counted = (defaultdict[str, float](float) for _ in range(3))


def timed(what: str, collective: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        finish_device()
        start = time.perf_counter()
        result = collective(*args, **kwargs)
        finish_device()
        seconds[what] += time.perf_counter() - start
        bytes_sent[what] += size(*args, **kwargs)
        return result

    return call


def sent_to_others(
    output: Tensor, rows: Tensor, receive: Any = None, send: Any = None, group: Any = None
) -> float:
    if send is None:  # counts, the same for every rank
        return rows.nbytes * (1 - 1 / dist.get_world_size(group))
    row = rows.size(-1) * rows.element_size()
    return float((sum(send) - send[dist.get_rank(group)]) * row)


def ring(tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> float:
    ranks = dist.get_world_size(group)
    return 2 * (ranks - 1) / ranks * tensor.nbytes


def count_updates(plain: Callable[..., Any]) -> Callable[..., Any]:
    def train_step(self: Trainer, samples: list[Any], raise_oom: bool = False) -> Any:
        if self.get_num_updates() == WARM_UP:
            for counter in (bytes_sent, seconds, counted):
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
    dist.all_to_all_single = timed("rows", dist.all_to_all_single, sent_to_others)
    dist.all_reduce = timed("reductions", dist.all_reduce, ring)
    Trainer.train_step = count_updates(Trainer.train_step)
    cli_main()
    if not dist.is_initialized() or dist.get_rank() == 0:
        count = counted["updates"]
        result = {
            "tokens_per_update": counted["tokens"] / count,
            "seconds_per_update": seconds.pop("update") / count,
            "bytes_sent": {what: value / count for what, value in bytes_sent.items()},
            "seconds": {what: value / count for what, value in seconds.items()},
        }
        write_json(target, result)


if __name__ == "__main__":
    main()
