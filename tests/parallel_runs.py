"""Trains with fairseq's own loop on several ranks, and compares what each update did with one process's."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import fairseq_cli.train
import torch
import torch._dynamo  # noqa: F401  (optimizers import it at their first step: 3 s of a core in every rank)
import torch.distributed as dist
from commands import PLUGIN, TINY_LM, TINY_MT, TRAIN
from distributed import run_ranks
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.optim import FairseqOptimizer
from fairseq.trainer import Trainer
from omegaconf import DictConfig
from tolerances import assert_same

import xmoe_fairseq  # noqa: F401  (registers the models)

Run = dict[str, Any]
# fairseq keeps copies of dense encoder layers' weights that nothing reads, and a buffer that nothing sets.
UNUSED = re.compile(r"encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$|_float_tensor$")
MT, LM = TINY_MT[len(PLUGIN) :], TINY_LM[len(PLUGIN) :]  # the plugin is imported already
EXACT = (
    *TRAIN, "--dropout", 0, "--clip-norm", 0.1, "--required-batch-size-multiple", 1,
    # Adam divides by the gradient's size. Where that is rounding only (a key's bias), eps must hold it down.
    "--adam-eps", 1e-5,
)  # fmt: skip


def train(world_size: int, *flags: object) -> list[Run]:
    """Each rank's record: per update its gradients before clipping, their norm and the logged sums; the
    weights at the end; names of the experts."""

    configured(*map(str, flags))  # once for all ranks: it takes longer than the training

    def rank() -> Run:
        with recorded() as run:
            fairseq_train(*flags)
        return run

    return run_ranks(world_size, rank)


@cache
def configured(*arguments: str) -> DictConfig:
    parsed = options.parse_args_and_arch(options.get_training_parser(), list(arguments))
    return convert_namespace_to_omegaconf(parsed)


def fairseq_train(*flags: object) -> None:
    """In this process, which is one rank of the process group if there is one."""
    cfg = configured(*map(str, flags))
    if dist.is_initialized():
        ranks = cfg.distributed_training
        ranks.distributed_world_size, ranks.distributed_rank = dist.get_world_size(), dist.get_rank()
        ranks.distributed_init_method, ranks.distributed_backend = "env://", "gloo"
        ranks.distributed_no_spawn = True
    distributed_utils.call_main(cfg, fairseq_cli.train.main)


@contextmanager
def recorded() -> Iterator[Run]:
    run: Run = {"gradients": [], "norms": [], "logs": [], "valid": {}}
    trainers: list[Trainer] = []
    plain_init, plain_clip = Trainer.__init__, FairseqOptimizer.clip_grad_norm
    plain_stats = Trainer._reduce_and_log_stats

    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        trainers.append(self)
        plain_init(self, *args, **kwargs)

    def clip(self: FairseqOptimizer, *args: Any, **kwargs: Any) -> Any:
        named = trainers[0].get_model().named_parameters()
        # legacy_ddp gives zeros to the encoder's unused copies of weights, one process gives nothing
        run["gradients"].append(
            {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}
        )
        return plain_clip(self, *args, **kwargs)

    def check(self: Trainer, norm: torch.Tensor) -> None:
        run["norms"].append(norm.float())

    def stats(self: Trainer, logs: list[dict], sample_size: Any, *args: Any) -> Any:
        sums = Counter(numbers(logs))
        sums["sample_size of the step"] = float(sample_size)
        if args:  # with a gradient norm
            run["logs"].append(dict(sums))
        else:  # ranks take one batch each at a time, so only the total can be compared
            run["valid"] = dict(Counter(run["valid"]) + sums)
        return plain_stats(self, logs, sample_size, *args)

    with (
        patch.object(Trainer, "__init__", init),
        patch.object(FairseqOptimizer, "clip_grad_norm", clip),
        patch.object(Trainer, "_check_grad_norms", check),
        patch.object(Trainer, "_reduce_and_log_stats", stats),
    ):
        yield run
    model = trainers[0].get_model()
    run["weights"] = {name: p.detach() for name, p in model.named_parameters() if not UNUSED.search(name)}
    run["experts"] = {name for name, p in model.named_parameters() if hasattr(p, "expert")}


def numbers(logs: list[dict[str, Any]]) -> dict[str, float]:
    """The sums of what was logged; a tensor's numbers under names with their place."""
    sums = {}
    for key in logs[0]:
        total = torch.as_tensor(sum(log.get(key, 0) for log in logs)).double()
        names = [key] if total.dim() == 0 else [f"{key} {i}" for i in range(total.numel())]
        sums.update(zip(names, total.flatten().tolist(), strict=True))
    return sums


def assert_same_training(runs: list[Run], reference: Run, parallel_size: int) -> None:
    """Every rank did what the one process did; and all replicas hold the same bits."""
    assert (parallel_size > 1) == bool(runs[0]["experts"])
    assert len(runs[0]["gradients"]) == len(reference["gradients"]) > 0
    for update, expected in enumerate(reference["gradients"]):
        whole = put_together([run["gradients"][update] for run in runs], runs[0]["experts"], parallel_size)
        assert_same(whole, expected, what=f"gradient at update {update + 1}")
    for run in runs:
        assert_same(run["norms"], reference["norms"])
        assert torch.equal(torch.stack(run["norms"]), torch.stack(runs[0]["norms"]))
        for got, logged in zip(run["logs"], reference["logs"], strict=True):
            assert_same(got, logged, dtype=torch.float32)
        assert_same(run["valid"], reference["valid"], dtype=torch.float32)
    weights = put_together([run["weights"] for run in runs], runs[0]["experts"], parallel_size)
    assert_same(weights, reference["weights"], what="weight")


def put_together(
    per_rank: list[dict[str, torch.Tensor]], experts: set[str], parallel_size: int
) -> dict[str, torch.Tensor]:
    """One dict for all ranks, after a look whether those that must hold the same bits do."""
    whole = {}
    for name in per_rank[0]:
        distinct = parallel_size if name in experts else 1
        for rank, tensors in enumerate(per_rank):
            assert torch.equal(tensors[name], per_rank[rank % distinct][name]), f"{name} on rank {rank}"
        parts = [tensors[name] for tensors in per_rank[:distinct]]
        whole[name] = torch.cat(parts) if distinct > 1 else parts[0]
    return whole
