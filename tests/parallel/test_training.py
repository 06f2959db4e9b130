"""W ranks train exactly as one process does on the same global batches, wherever the experts lie.

The load-balance loss is per rank and micro-batch, as every loss in fairseq; so the one process takes the
ranks' batches as micro-batches: --update-freq W times as large.
"""

from functools import cache
from pathlib import Path

import pytest
from parallel_runs import EXACT, LM, MT, Run, assert_same_training, train

# A budget that counts the other experts alone.
CHEAP = ("--moe-zero-experts", 1, "--moe-constant-experts", 2, "--moe-target-experts-per-token", 1.5)
SIZES = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, ranks that share out the experts


def task_flags(kind: str, corpus: tuple[Path, Path]) -> tuple[object, ...]:
    return (*((corpus[0], *MT) if kind == "translation" else (corpus[1], *LM)), *EXACT, "--no-save")


@cache
def one_process(*flags: object) -> Run:
    return train(1, *flags)[0]


@pytest.mark.parametrize("ranks, size", SIZES)
@pytest.mark.parametrize("kind", ["translation", "language"])
def test_ranks_train_as_one_process(kind: str, ranks: int, size: int, corpus: tuple[Path, Path]) -> None:
    """Losses, logged sums, gradients, norm, weights after 3 updates of Adam with clipping; validation too."""
    flags = (*task_flags(kind, corpus), "--max-update", 3)
    reference = one_process(*flags, "--update-freq", 2 * ranks)
    backend = ("--ddp-backend", "legacy_ddp", "--moe-expert-parallel-size", size)
    runs = train(ranks, *flags, "--update-freq", 2, *backend)
    assert_same_training(runs, reference, size)
    assert reference["norms"][0] > 0.1  # clipping was at work


def test_ranks_train_a_router_with_a_hidden_layer_as_one_process(corpus: tuple[Path, Path]) -> None:
    flags = (*task_flags("language", corpus), "--max-update", 2, "--moe-router-hidden-dim", 8)
    runs = train(2, *flags, "--ddp-backend", "legacy_ddp", "--moe-expert-parallel-size", 2)
    assert_same_training(runs, one_process(*flags, "--update-freq", 2), 2)


@pytest.mark.parametrize("penalty", ["hoyer", "l1"])
@pytest.mark.parametrize("batch_size, update_freq", [(8, 2), (7, 3)])
def test_ranks_train_a_dense_model_with_a_penalty_as_one_process(
    batch_size: int, update_freq: int, penalty: str, corpus: tuple[Path, Path]
) -> None:
    """Of batches of 7 there are 14: two ranks of four get a dummy, which has no activations to count."""
    flags = (*task_flags("translation", corpus), "--max-epoch", 1, "--moe-freq", 0)
    flags = (*flags, "--batch-size", batch_size, "--ffn-sparsity", penalty, "--ffn-sparsity-coeff", 0.5)
    reference = one_process(*flags, "--update-freq", 4 * update_freq)
    assert reference["logs"][0]["ffn_neurons"] > 0
    assert_same_training(train(4, *flags, "--update-freq", update_freq), reference, 1)


def test_pytorch_ddp_trains_as_one_process(corpus: tuple[Path, Path]) -> None:
    flags = (*task_flags("translation", corpus), "--max-update", 3)
    runs = train(4, *flags, "--update-freq", 2, "--moe-expert-parallel-size", 2)
    assert_same_training(runs, one_process(*flags, "--update-freq", 8), 2)


@pytest.mark.parametrize("size, update_freq", [(1, 3), (2, 3)])
def test_dummy_batches_count_for_nothing(size: int, update_freq: int, corpus: tuple[Path, Path]) -> None:
    """14 batches for 4 ranks: two ranks get a dummy at the end of the epoch, also amid an update."""
    flags = (*task_flags("translation", corpus), "--batch-size", 7, "--max-epoch", 1)
    runs = train(4, *flags, "--update-freq", update_freq, "--moe-expert-parallel-size", size)
    assert_same_training(runs, one_process(*flags, "--update-freq", 4 * update_freq), size)


@pytest.mark.parametrize("size, rule", [(1, "mass"), (2, "mass"), (2, "probability"), (2, "relative")])
def test_ranks_steer_to_a_budget_as_one_process(size: int, rule: str, corpus: tuple[Path, Path]) -> None:
    """By all ranks' tokens, and not by those of a dummy batch: validation uses the last t."""
    flags = (*task_flags("translation", corpus), "--batch-size", 7, "--max-epoch", 1)
    flags = (*flags, "--moe-target-experts-per-token", 2.5, "--moe-threshold-rule", rule)
    flags = (*flags, "--moe-shared-experts", 1)  # which every rank holds; the target counts it
    runs = train(4, *flags, "--update-freq", 3, "--moe-expert-parallel-size", size)
    reference = one_process(*flags, "--update-freq", 12)
    assert_same_training(runs, reference, size)
    used = [mean_threshold(log) for log in [*reference["logs"], reference["valid"]]]
    assert len(set(used)) == len(used) > 2


@pytest.mark.parametrize("balance, size", [("global", 1), ("global", 2), ("bias", 2)])
def test_ranks_balance_as_one_process(balance: str, size: int, corpus: tuple[Path, Path]) -> None:
    """By the choices of all ranks and micro-batches, and not by those of a dummy batch."""
    flags = (*task_flags("translation", corpus), "--batch-size", 7, "--max-epoch", 1)
    flags = (*flags, "--moe-balance", balance, "--moe-loss-coeff", 1.0, *CHEAP)
    flags += ("--moe-balance-step", 0.05) * (balance == "bias")
    runs = train(4, *flags, "--update-freq", 3, "--moe-expert-parallel-size", size)
    assert_same_training(runs, one_process(*flags, "--update-freq", 12), size)


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_steer_a_relu_router_as_one_process(size: int, corpus: tuple[Path, Path]) -> None:
    """Its lambda by all ranks' rows, and not by those of a dummy batch; its loss weighs as it says."""
    flags = (*task_flags("translation", corpus), "--batch-size", 7, "--max-epoch", 1, "--moe-router", "relu")
    runs = train(4, *flags, "--update-freq", 3, "--moe-expert-parallel-size", size)
    reference = one_process(*flags, "--update-freq", 12)
    assert_same_training(runs, reference, size)
    used = [log["moe_decoder_l1_coeff 0"] / log["moe_decoder_tokens 0"] for log in reference["logs"]]
    assert used == [pytest.approx(1e-8 * 1.2**update) for update in range(len(used))]


def test_ranks_learn_thresholds_as_one_process(corpus: tuple[Path, Path]) -> None:
    flags = (
        *task_flags("language", corpus),
        "--max-update",
        3,
        "--moe-router",
        "topany",
        "--moe-loss-coeff",
        1,
    )
    runs = train(2, *flags, "--moe-expert-parallel-size", 2)
    reference = one_process(*flags, "--update-freq", 2)
    assert_same_training(runs, reference, 2)
    learned = [value for name, value in reference["weights"].items() if name.endswith("threshold_E")]
    assert learned and all(value.any() for value in learned)


def mean_threshold(log: dict[str, float]) -> float:
    return log["moe_decoder_threshold 0"] / log["moe_decoder_tokens 0"]


def test_recomputed_activations_take_part_in_every_exchange(corpus: tuple[Path, Path]) -> None:
    flags = (*task_flags("translation", corpus), "--max-update", 2)
    recompute = ("--checkpoint-activations", "--moe-expert-parallel-size", 2, "--ddp-backend", "legacy_ddp")
    runs = train(2, *flags, "--update-freq", 1, *recompute)
    assert_same_training(runs, one_process(*flags, "--update-freq", 2), 2)
