"""Shared experts: what n of them are together, and where they count. (Their sums: test_oracle.py.)"""

import pytest
import torch
from tolerances import assert_same

from xmoe_fairseq.moe import MoELayer, RoutingStats, TopKRouter
from xmoe_fairseq.moe.stats import ffn_flops

D, F, E = 8, 5, 4


def layer_with(shared: int, **how: object) -> MoELayer:
    torch.manual_seed(3)
    return MoELayer(D, F, E, TopKRouter(D, E, 2), dense_ffn_dim=20, shared_experts=shared, **how)


def test_one_wide_ffn_is_the_sum_of_n_experts() -> None:
    """DeepSeekMoE, eq. 9: sum over i of FFN_i(x), of n experts with parameters of their own."""
    torch.manual_seed(5)
    layer, x_TD = layer_with(3), torch.randn(6, D)
    w1, b1, w2, b2 = torch.randn(3, F, D), torch.randn(3, F), torch.randn(3, D, F), torch.randn(3, D)
    fc1, fc2 = layer.shared.fc1, layer.shared.fc2
    fc1.weight.data, fc1.bias.data = w1.flatten(0, 1), b1.flatten()
    fc2.weight.data, fc2.bias.data = w2.transpose(0, 1).flatten(1), b2.sum(0)
    each = [torch.relu(x_TD @ w1[i].T + b1[i]) @ w2[i].T + b2[i] for i in range(3)]
    routed = layer_with(0)
    routed.load_state_dict({n: p for n, p in layer.state_dict().items() if not n.startswith("shared.")})
    assert_same(layer(x_TD)[0], routed(x_TD)[0] + sum(each))


def test_routed_experts_begin_as_without() -> None:
    with_, without = layer_with(2).state_dict(), layer_with(0).state_dict()
    assert with_.keys() - without.keys() == {
        f"shared.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert all(torch.equal(with_[name], value) for name, value in without.items())


def test_they_count_in_flops_and_in_experts_per_token() -> None:
    layer = layer_with(2)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    _, routing = layer(torch.randn(2, 3, D), mask)
    stats = RoutingStats.of(routing) + RoutingStats.of(routing)
    assert routing.experts_per_token == 4 and stats.rows_computed / stats.tokens == 4
    assert stats.rows_wanted == stats.rows_kept == 2 * 2 * 5  # what was chosen: nothing was dropped
    flops, router = layer.flops(stats), 10 * 2 * D * E
    assert flops["flops"] == router + ffn_flops(10 * 4, D, F)
    assert flops["flops_all_experts"] == router + ffn_flops(10 * 6, D, F)
    assert flops["flops_dense_ffn"] == ffn_flops(10, D, 20)
    assert layer_with(2)(torch.zeros(0, D))[1].experts_per_token == 0


def test_dropout_is_the_experts() -> None:
    layer = layer_with(1, activation_dropout=0.5).eval()
    x_TD = torch.randn(5, D)
    with torch.no_grad():
        layer.experts.fc2_weight.zero_()
        fixed = layer(x_TD)[0]
        assert torch.equal(layer(x_TD)[0], fixed)
        layer.retain_dropout()
        assert not torch.equal(layer(x_TD)[0], layer(x_TD)[0])


def test_padding_is_not_computed() -> None:
    layer, x = layer_with(1), torch.full((1, 2, D), float("nan"))
    x[0, 0] = 1.0
    y, _ = layer(x, torch.tensor([[False, True]]))
    assert (y[0, 1] == 0).all() and y[0, 0].isfinite().all()


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="shared_experts must be 0"):
        layer_with(-1)
