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


ALL = torch.arange(WIDTH)


def seen_by(ffn: FeedForward, x_TD: Tensor, shared: float = 0.0) -> CoActivation:
    seen = CoActivation(ffn, pairs=True, shared=shared)
    for batch_TD in x_TD.split(100):
        seen.add(ffn.hidden(batch_TD))
    return seen


@pytest.mark.parametrize("method", GROUPINGS)
def test_each_neuron_is_in_one_of_the_equal_groups(method: str) -> None:
    ffn = ffn_of(torch.randn(WIDTH, MODEL_DIM), torch.randn(WIDTH) - 2)
    ffn.fc1_bias[3] = -100.0  # a neuron that is never active
    seen = seen_by(ffn, torch.randn(200, MODEL_DIM))
    for neurons_N, groups in ((ALL, 2), (ALL, 8), (ALL, 32), (ALL[8:].flip(0), 3)):
        neurons_EF = group(method, ffn, seen, groups, 1, neurons_N)
        assert neurons_EF.shape == (groups, len(neurons_N) // groups)
        assert neurons_EF.flatten().sort().values.tolist() == sorted(neurons_N.tolist())
        assert torch.equal(neurons_EF, group(method, ffn, seen, groups, 1, neurons_N))


@pytest.mark.parametrize("method", ["coactivation", "clustering"])
def test_planted_groups_are_found(method: str) -> None:
    ffn, group_F, x_TD = planted()
    neurons_EF = group(method, ffn, seen_by(ffn, x_TD), NUM_GROUPS, 1, ALL)
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


@pytest.mark.parametrize("hidden_dim", [0, 8])
def test_the_router_ranks_experts_by_what_they_contribute(hidden_dim: int) -> None:
    ffn, _, x_TD = planted()
    seen = seen_by(ffn, x_TD)
    neurons_EF = group("coactivation", ffn, seen, NUM_GROUPS, 1, ALL)
    parts = Parts(ffn, neurons_EF, seen.mean_hidden(), ALL[:0])
    fit = RouterFit(parts, steps=200, seed=1, hidden_dim=hidden_dim, lr=0.05)
    for _ in range(100):
        fit.add(x_TD)
    shares_TE, probs_TE = parts.shares(x_TD), fit.router.score(x_TD).detach().softmax(dim=1)
    assert_same(shares_TE.sum(dim=1), torch.ones(512))
    assert (shares_TE.argmax(dim=1) == probs_TE.argmax(dim=1)).float().mean() > 0.98
    uniform = F.kl_div(torch.full_like(shares_TE, 0.25).log(), shares_TE, reduction="batchmean")
    assert F.kl_div(probs_TE.log(), shares_TE, reduction="batchmean") < 0.2 * uniform


def test_the_most_often_active_neurons_are_shared() -> None:
    """By what they add: a neuron of large h whose column of fc2 is 0 is never active."""
    ffn, group_F, x_TD = planted()
    often_F, idle = group_F == 2, int((group_F == 1).nonzero()[0])
    ffn.fc1_bias[often_F], ffn.fc1_bias[idle], ffn.fc2_weight[:, idle] = 20.0, 100.0, 0.0
    shared_N, others_N = seen_by(ffn, x_TD, shared=1 / NUM_GROUPS).shared_and_others()
    assert sorted(shared_N.tolist()) == often_F.nonzero().flatten().tolist()
    assert sorted([*shared_N.tolist(), *others_N.tolist()]) == ALL.tolist()


@pytest.mark.parametrize("shared", [0, 1])
def test_parts_add_up_to_the_dense_ffn_and_what_is_left_out_to_its_mean(shared: int) -> None:
    ffn, _, x_TD = planted()
    seen, num_experts = seen_by(ffn, x_TD, shared / NUM_GROUPS), NUM_GROUPS - shared
    shared_N, routed_N = seen.shared_and_others()
    neurons_EF = group("random", ffn, seen, num_experts, 1, routed_N)
    parts = Parts(ffn, neurons_EF, seen.mean_hidden(), shared_N)
    router = ThresholdRouter(MODEL_DIM, num_experts, 1.0)
    sizes = MODEL_DIM, WIDTH // NUM_GROUPS, num_experts
    layer = MoELayer(*sizes, router, combine="ones", shared_experts=shared)
    layer.load_state_dict({**parts.state(), "router.weight": torch.eye(num_experts, MODEL_DIM)})
    hidden_TF = ffn.hidden(x_TD)
    dense = hidden_TF @ ffn.fc2_weight.t() + ffn.fc2_bias
    assert_same(layer(x_TD)[0], dense)
    hidden_TF[:, routed_N] = hidden_TF[:, routed_N].mean(dim=0)  # no routed expert at all
    expected = hidden_TF @ ffn.fc2_weight.t() + ffn.fc2_bias
    assert_same(layer.output_bias + (layer.shared(x_TD) if shared else torch.zeros(512, 1)), expected)
