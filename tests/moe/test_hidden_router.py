"""Routers that score by a hidden layer (--moe-router-hidden-dim)."""

import pytest
import torch
from tolerances import assert_same

from xmoe_fairseq.moe import MoELayer, ThresholdRouter, TopAnyRouter, TopKRouter, use_kernel

D, E, H = 6, 5, 3


def router_of(width: int = H) -> TopKRouter:
    router = TopKRouter(D, E, k=2)
    router.score_by_hidden(width)
    torch.nn.init.normal_(router.hidden.bias)
    return router


def test_scores_by_hand() -> None:
    router, x_TD = router_of(), torch.randn(7, D)
    hidden_TH = (x_TD @ router.hidden.weight.t() + router.hidden.bias).clamp(min=0)
    assert_same(router.score(x_TD), hidden_TH @ router.weight.t())
    assert [tuple(p.shape) for p in router.state_dict().values()] == [(E, H), (H, D), (H,)]
    router.temperature = 0.5
    assert_same(router.score(x_TD), 2 * hidden_TH @ router.weight.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_scores_are_those_of_the_same_numbers_in_fp32(dtype: torch.dtype) -> None:
    half = router_of().to(dtype)
    full = router_of()
    full.load_state_dict(half.state_dict())
    x_TD, grad_TE = torch.randn(7, D).to(dtype), torch.randn(7, E)
    scores_TE = half.score(x_TD)
    assert scores_TE.dtype == torch.float32 and torch.equal(scores_TE, full.score(x_TD.float()))
    for router, x in ((half, x_TD), (full, x_TD.float())):
        router.score(x).backward(grad_TE)
    assert_same(half.weight.grad.float(), full.weight.grad, dtype=dtype)
    assert_same(half.hidden.weight.grad.float(), full.hidden.weight.grad, dtype=dtype)


def test_a_layer_counts_its_flops_and_trains_it() -> None:
    layer = MoELayer(D, 4, E, router_of(), dense_ffn_dim=8)
    assert layer.router_flops == 2 * H * (D + E)
    y_TD, routing = layer(torch.randn(9, D))
    (y_TD.square().sum() + routing.load_balance_loss).backward()
    assert all(parameter.grad.any() for parameter in layer.router.parameters())


def test_the_choice_is_the_same_natively_and_plainly(native_library: None) -> None:
    router, x_TD = ThresholdRouter(D, E, 0.6), torch.randn(50, D)
    router.score_by_hidden(H)
    native = router(x_TD)
    with use_kernel("plain"):
        plain = router(x_TD)
    assert native.in_order is not None
    assert_same(native.combine_weights(), plain.combine_weights())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="TopAnyRouter cannot score by a hidden layer of width 4"):
        TopAnyRouter(D, E).score_by_hidden(4)
    with pytest.raises(ValueError, match="of width 0"):
        TopKRouter(D, E).score_by_hidden(0)
