"""What ranks send is what docs/scaling.md says, byte for byte."""

import re

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from documented import DOCS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from experiments import count_traffic
from xmoe_fairseq.moe import MoELayer, Router, ThresholdRouter, TopKRouter

RANKS, NUM_EXPERTS, MODEL_DIM = 4, 8, 16
TOKENS = [5, 0, 9, 30]  # of each rank


def count_layer(
    router: Router, dtype: torch.dtype, rank: int, recompute: bool = False
) -> tuple[dict[str, float], Tensor]:
    """Bytes and messages of a forward and a backward pass; the token and the expert of each of its pairs."""
    group = dist.group.WORLD
    moe = MoELayer(MODEL_DIM, 6, NUM_EXPERTS, router, expert_parallel_group=group).to(dtype)
    x_TD = torch.randn(TOKENS[rank], MODEL_DIM, generator=torch.Generator().manual_seed(rank)).to(dtype)
    with count_traffic.counting():
        x_TD.requires_grad_()
        y_TD, routing = checkpoint(moe, x_TD, use_reentrant=False) if recompute else moe(x_TD)
        y_TD.float().sin().sum().backward()
    bytes_sent, messages = count_traffic.bytes_sent, count_traffic.messages
    counted = {**bytes_sent, **{f"{what} messages": value for what, value in messages.items()}}
    return counted, torch.stack([routing.token_R, routing.expert_R])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ["threshold", "topk"])
def test_a_row_travels_once_to_each_rank(router: str, dtype: torch.dtype) -> None:
    sizes = MODEL_DIM, NUM_EXPERTS
    made = ThresholdRouter(*sizes, 0.7) if router == "threshold" else TopKRouter(*sizes, 3)
    results = run_ranks(RANKS, lambda: count_layer(made, dtype, dist.get_rank()))
    pairs = [
        (rank, token, expert // (NUM_EXPERTS // RANKS))
        for rank, (_, chosen) in enumerate(results)
        for token, expert in chosen.t().tolist()
    ]
    to_others = [pair for pair in pairs if pair[0] != pair[2]]
    assert len(set(to_others)) < len(to_others)
    sums = {what: sum(counted[what] for counted, _ in results) for what in results[0][0]}
    assert sums == {
        "rows": 4 * len(set(to_others)) * MODEL_DIM * dtype.itemsize,
        "choices": 12 * len(to_others),
        "counts": RANKS * 8 * (NUM_EXPERTS / RANKS + 1) * (RANKS - 1),
        "rows messages": 4 * RANKS,
        "choices messages": 2 * RANKS,
        "counts messages": RANKS,
    }


def test_a_recomputation_exchanges_all_but_gradients_again() -> None:
    made = TopKRouter(MODEL_DIM, NUM_EXPERTS, 3)
    once, again = (
        run_ranks(RANKS, lambda: count_layer(made, torch.float32, dist.get_rank(), recompute))  # noqa: B023
        for recompute in (False, True)
    )
    for (plain, _), (counted, _) in zip(once, again, strict=True):
        assert counted["rows"] == 1.5 * plain["rows"] and counted["counts"] == 2 * plain["counts"]
        assert [counted[f"{what} messages"] for what in ("rows", "choices", "counts")] == [6, 3, 2]


@pytest.mark.parametrize("k, num_experts, num_ranks", [(8, 64, 8), (4, 16, 2), (2, 32, 8), (1, 4, 4)])
def test_bytes_of_choices_that_spread_evenly(k: int, num_experts: int, num_ranks: int) -> None:
    tokens = 20000
    chosen_TK = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(1)).topk(k).indices
    goes_TN = torch.zeros(tokens, num_ranks).scatter_(1, chosen_TK // (num_experts // num_ranks), 1)
    expected = count_traffic.expected_bytes(k, num_experts, num_ranks, width=10, itemsize=2, tokens=tokens)
    assert expected["rows"] == pytest.approx(4 * 10 * 2 * float(goes_TN[:, 1:].sum()), rel=0.02)
    assert expected["choices"] == 12 * tokens * k * (num_ranks - 1) / num_ranks


def test_the_tables_of_the_documentation() -> None:
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    worked_out = re.findall(
        r"^\| [\d,]+(?:, E (\d+))? \| (\d+) \| \d+ \| ([\d.]+) \| \d+ ms", text, flags=re.M
    )
    assert len(worked_out) == 6
    for num_experts, num_ranks, gigabytes in worked_out:
        experts = int(num_experts or 64)
        layer = count_traffic.expected_bytes(8, experts, int(num_ranks), 1024, 2, tokens=8192)
        assert f"{12 * sum(layer.values()) / 1e9:.1f}" == gigabytes
    shares = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) % \|$", text, flags=re.M)
    assert len(shares) == 5
    for k, num_experts, num_ranks, per_token, percent in shares:
        one = count_traffic.expected_bytes(int(k), int(num_experts), int(num_ranks), 1, 1)["rows"] / 4
        rows = one * int(num_ranks) / (int(num_ranks) - 1)
        assert (f"{rows:.2f}", f"{100 * (1 - rows / int(k)):.0f}") == (per_token, percent)
