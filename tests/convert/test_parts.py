"""Grouping and router, on FFNs made so that the answer is known."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_same
from torch import Tensor, nn

from xmoe_fairseq.convert import grouping
from xmoe_fairseq.convert.ffn import FeedForward
from xmoe_fairseq.convert.grouping import GROUPINGS, CoActivation, group
from xmoe_fairseq.convert.router_fit import Parts, RouterFit
from xmoe_fairseq.moe import MoELayer, ThresholdRouter

WIDTH, NUM_GROUPS, MODEL_DIM = 32, 4, 8


def ffn_of(fc1_weight: Tensor, fc1_bias: Tensor) -> FeedForward:
    fc2_weight = torch.randn(MODEL_DIM, fc1_weight.size(0))
    return FeedForward(
        "decoder.layers.0", nn.Identity(), fc1_weight, fc1_bias, fc2_weight, torch.randn(MODEL_DIM), F.relu
    )


def planted() -> tuple[FeedForward, Tensor, Tensor]:
    """Group g of neurons, shuffled, is active for tokens of kind g alone: (ffn, group of neuron, tokens)."""
    group_F = torch.arange(NUM_GROUPS).repeat_interleave(WIDTH // NUM_GROUPS)[torch.randperm(WIDTH)]
    directions = torch.eye(MODEL_DIM)[:NUM_GROUPS]
    fc1_weight = 3 * directions[group_F] + 0.1 * torch.randn(WIDTH, MODEL_DIM)
    x_TD = 2 * directions[torch.randint(NUM_GROUPS, (512,))] + 0.1 * torch.randn(512, MODEL_DIM)
    return ffn_of(fc1_weight, torch.full((WIDTH,), -1.5)), group_F, x_TD


def seen_by(ffn: FeedForward, x_TD: Tensor) -> CoActivation:
    seen = CoActivation(ffn, pairs=True)
    for batch_TD in x_TD.split(100):
        seen.add(ffn.hidden(batch_TD))
    return seen


@pytest.mark.parametrize("method", GROUPINGS)
def test_each_neuron_is_in_one_of_the_equal_groups(method: str) -> None:
    ffn = ffn_of(torch.randn(WIDTH, MODEL_DIM), torch.randn(WIDTH) - 2)
    ffn.fc1_bias[3] = -100.0  # a neuron that is never active
    seen = seen_by(ffn, torch.randn(200, MODEL_DIM))
    for groups in (2, 8, 32):
        neurons_EF = group(method, ffn, seen, groups, seed=1)
        assert neurons_EF.shape == (groups, WIDTH // groups)
        assert neurons_EF.flatten().sort().values.tolist() == list(range(WIDTH))
        assert torch.equal(neurons_EF, group(method, ffn, seen, groups, seed=1))


@pytest.mark.parametrize("method", ["coactivation", "clustering"])
def test_planted_groups_are_found(method: str) -> None:
    ffn, group_F, x_TD = planted()
    neurons_EF = group(method, ffn, seen_by(ffn, x_TD), NUM_GROUPS, seed=1)
    assert all(len(set(group_F[neurons].tolist())) == 1 for neurons in neurons_EF)


def test_sums_over_batches_are_those_over_all() -> None:
    ffn, _, x_TD = planted()
    once = CoActivation(ffn, pairs=True)
    once.add(ffn.hidden(x_TD))
    assert_same(seen_by(ffn, x_TD).pairs_FF, once.pairs_FF)
    assert_same(once.mean_hidden(), ffn.hidden(x_TD).mean(dim=0))


def test_pairs_are_looked_at_in_the_first_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "PAIR_TOKENS", 150)
    ffn, _, x_TD = planted()
    few = CoActivation(ffn, pairs=True)
    few.add(ffn.hidden(x_TD[:200]))  # as its batches of 100: the second begins before token 150
    seen = seen_by(ffn, x_TD)
    assert_same(seen.pairs_FF, few.pairs_FF)
    assert_same(seen.mean_hidden(), ffn.hidden(x_TD).mean(dim=0))


def test_the_router_ranks_experts_by_what_they_contribute() -> None:
    ffn, _, x_TD = planted()
    seen = seen_by(ffn, x_TD)
    parts = Parts(ffn, group("coactivation", ffn, seen, NUM_GROUPS, seed=1), seen.mean_hidden())
    fit = RouterFit(parts, steps=200, seed=1, lr=0.05)
    for _ in range(100):
        fit.add(x_TD)
    shares_TE, probs_TE = parts.shares(x_TD), (x_TD @ fit.weight_ED.detach().t()).softmax(dim=1)
    assert_same(shares_TE.sum(dim=1), torch.ones(512))
    assert (shares_TE.argmax(dim=1) == probs_TE.argmax(dim=1)).float().mean() > 0.98
    uniform = F.kl_div(torch.full_like(shares_TE, 0.25).log(), shares_TE, reduction="batchmean")
    assert F.kl_div(probs_TE.log(), shares_TE, reduction="batchmean") < 0.2 * uniform


def test_parts_add_up_to_the_dense_ffn_and_what_is_left_out_to_its_mean() -> None:
    ffn, _, x_TD = planted()
    seen = seen_by(ffn, x_TD)
    parts = Parts(ffn, group("random", ffn, seen, NUM_GROUPS, seed=1), seen.mean_hidden())
    router = ThresholdRouter(MODEL_DIM, NUM_GROUPS, 1.0)
    layer = MoELayer(MODEL_DIM, WIDTH // NUM_GROUPS, NUM_GROUPS, router, combine="ones")
    layer.load_state_dict({**parts.state(), "router.weight": torch.eye(NUM_GROUPS, MODEL_DIM)})
    dense = ffn.hidden(x_TD) @ ffn.fc2_weight.t() + ffn.fc2_bias
    assert_same(layer(x_TD)[0], dense)
    assert_same(layer.output_bias.detach(), dense.mean(dim=0))  # no expert at all
