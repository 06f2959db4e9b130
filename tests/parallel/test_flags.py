"""What cannot go with experts on several ranks ends with one line; precision keeps the experts apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY_MT, TRAIN, run
from distributed import run_ranks
from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
from fairseq.trainer import Trainer
from parallel_runs import EXACT, MT, configured, put_together, train
from tolerances import assert_same
from toy import language_model, translation_model

from xmoe_fairseq.config import MoEConfig, expert_parallel_size
from xmoe_fairseq.parallel.check import check_optimizer, check_training
from xmoe_fairseq.trainer import MoETrainer
from xmoe_fairseq_compat.errors import FlagError


@pytest.mark.parametrize("flag, ranks, size", [(1, 4, 1), (-1, 4, 4), (2, 4, 2), (-1, 1, 1)])
def test_size(flag: int, ranks: int, size: int) -> None:
    assert expert_parallel_size(MoEConfig(moe_expert_parallel_size=flag, moe_num_experts=8), ranks) == size


@pytest.mark.parametrize(
    "flag, ranks, message",
    [
        (3, 4, "--moe-expert-parallel-size must divide the number of ranks 4, got 3"),
        (4, 1, "--moe-expert-parallel-size must divide the number of ranks 1, got 4"),
        (-1, 3, "--moe-expert-parallel-size must divide --moe-num-experts 8, got 3"),
    ],
)
def test_wrong_sizes(flag: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_parallel_size(MoEConfig(moe_expert_parallel_size=flag, moe_num_experts=8), ranks)
    dense = MoEConfig(moe_expert_parallel_size=flag, moe_num_experts=8, moe_freq=0)
    assert expert_parallel_size(dense, ranks) == 1


@pytest.mark.parametrize("size", [0, -2, True])
def test_sizes_that_never_fit_are_refused_when_the_model_is_built(size: Any) -> None:
    with pytest.raises(ValueError, match="--moe-expert-parallel-size must be"):
        language_model(moe_expert_parallel_size=size)


def configuration(*flags: str) -> Any:
    return configured("folder", *MT, *map(str, TRAIN), *flags)


@pytest.mark.parametrize("backend", ["fully_sharded", "slowmo"])
def test_backends_that_nobody_has_tried_with_experts(backend: str) -> None:
    refusal = f"--ddp-backend {backend} cannot be combined with MoE layers: use legacy_ddp or pytorch_ddp"
    with pytest.raises(ValueError, match=refusal):
        MoETrainer(configuration("--ddp-backend", backend), None, translation_model(), None)


def test_a_fully_sharded_model_with_experts_is_refused() -> None:
    """As fairseq-train makes it on GPUs: fairscale's wrapper around all, before there is a trainer."""
    pytest.importorskip("fairscale")
    cfg = configuration("--ddp-backend", "fully_sharded")

    def rank() -> str:
        with fsdp_enable_wrap(cfg.distributed_training):
            model = fsdp_wrap(translation_model(), compute_device=torch.device("cpu"))
        with pytest.raises(FlagError) as refused:
            Trainer(cfg, None, model, None)
        return str(refused.value)

    (line, _) = run_ranks(2, rank)
    assert line.startswith("--ddp-backend fully_sharded cannot be combined with MoE layers: use legacy_ddp")


REFUSED = [
    (("--fp16",), "--fp16 with flat gradients .*: add --fp16-no-flatten-grads"),
    (("--amp",), "--amp .*: use --bf16, or --fp16 --fp16-no-flatten-grads"),
    (("--zero-sharding", "os"), "--zero-sharding os .*: leave it out"),
    (("--use-bmuf",), "--use-bmuf .*: leave it out"),
    (("--store-ema", "--ema-fp32"), "--ema-fp32 .*: leave it out"),
    (("--decoder-layerdrop", "0.1"), "--decoder-layerdrop .*: it must be 0"),
    (("--eval-bleu",), "--eval-bleu .*: add --no-moe-decoder, or score"),
]


@pytest.mark.parametrize("flags, message", REFUSED, ids=lambda value: value[0])
def test_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_training(configuration(*flags), translation_model())


@pytest.mark.parametrize(
    "flags",
    [
        (), ("--bf16",), ("--fp16", "--fp16-no-flatten-grads"), ("--memory-efficient-fp16",),
        ("--ddp-backend", "legacy_ddp"), ("--store-ema",),
    ],
)  # fmt: skip
def test_allowed(flags: tuple[str, ...]) -> None:
    check_training(configuration(*flags), translation_model())
    check_training(configuration("--eval-bleu"), translation_model(no_moe_decoder=True))


@pytest.mark.parametrize(
    "backend, messages, warns",
    [("pytorch_ddp", "nccl", True), ("legacy_ddp", "nccl", False), ("pytorch_ddp", "gloo", False)],
)
def test_two_communicators_should_not_be_busy_at_once(
    backend: str, messages: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_training(
        configuration("--ddp-backend", backend, "--distributed-backend", messages), translation_model()
    )
    assert ("use --ddp-backend legacy_ddp" in caplog.text) == warns


def test_optimizers_must_update_every_weight_by_itself(corpus: tuple[Path, Path]) -> None:
    from fairseq import optim

    cfg = configuration("--optimizer", "adafactor").optimizer
    optimizer = optim.build_optimizer(cfg, [torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="--optimizer adafactor cannot be combined .* use one that updates"):
        check_optimizer(optimizer, cfg)


def test_a_size_for_more_ranks_than_there_are_ends_with_one_line(corpus: tuple[Path, Path]) -> None:
    flags = (corpus[0], *TINY_MT, *TRAIN, "--moe-expert-parallel-size", 2, "--max-update", 1, "--no-save")
    output = run("fairseq-train", *flags, succeeds=False)
    line = "fairseq-train: error: --moe-expert-parallel-size must divide the number of ranks 1, got 2"
    assert output.strip().splitlines()[-1] == line and "Traceback" not in output


@pytest.mark.parametrize(
    "precision",
    [
        ("--bf16",),
        ("--memory-efficient-bf16",),
        ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4),
    ],
    ids=lambda flags: flags[0],
)
def test_low_precision_keeps_the_experts_apart(precision: tuple, corpus: tuple[Path, Path]) -> None:
    """Tagged through fairseq's optimizers: replicas alike, and the norm that of one process."""
    flags = (corpus[0], *MT, *EXACT, *precision, "--no-save", "--max-update", 3, "--disable-validation")
    runs = train(4, *flags, "--moe-expert-parallel-size", 2)
    (reference,) = train(1, *flags, "--update-freq", 4)
    put_together([run["weights"] for run in runs], runs[0]["experts"], 2)
    norms, expected = (torch.stack(run["norms"]) for run in (runs[0], reference))
    assert_same(norms, expected, dtype=torch.bfloat16, terms=1)


def test_an_overflow_skips_the_update_on_every_rank(corpus: tuple[Path, Path]) -> None:
    """The first scales are too large; a norm that one rank saw alone would part the replicas."""
    precision = ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 2**30)
    flags = (corpus[0], *MT, *EXACT, *precision, "--no-save", "--max-epoch", 2, "--disable-validation")
    runs = train(4, *flags, "--moe-expert-parallel-size", 2)
    put_together([run["weights"] for run in runs], runs[0]["experts"], 2)
    attempts = {len(run["gradients"]) for run in runs}
    updates = {len(run["norms"]) for run in runs}
    assert len(attempts) == len(updates) == 1
    assert updates.pop() < attempts.pop()  # some were skipped, by all


def test_a_model_without_moe_layers_has_nothing_to_share_out(corpus: tuple[Path, Path]) -> None:
    flags = (corpus[0], *MT, *EXACT, "--no-save", "--max-update", 1, "--disable-validation")
    runs = train(
        2,
        *flags,
        "--moe-expert-parallel-size",
        2,
        "--no-moe-encoder",
        "--no-moe-decoder",
        "--ddp-backend",
        "legacy_ddp",
    )
    assert runs[0]["experts"] == set()
