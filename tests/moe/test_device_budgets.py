"""What a layer may cost on a GPU, counted on a CPU: the table of scripts/gpu_check/budgets.py."""

import pytest
import torch
from tolerances import assert_same

from gpu_check.budgets import BUDGETS, ROUTERS, D, E, cost_of


@pytest.mark.parametrize("name", BUDGETS)
def test_waits_kernels_and_bytes(name: str) -> None:
    cost, wrong = cost_of(name)
    assert cost.waits == BUDGETS[name].waits
    assert all(took <= most for took, most in zip(cost, BUDGETS[name], strict=True)), cost
    assert not wrong


@pytest.mark.parametrize("router", ["threshold", "budget", "topk"])
def test_a_router_compiles_into_one_graph_for_all_sizes(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By "aot_eager": inductor's C++ takes a compiler too long for a suite."""
    torch._dynamo.reset()
    monkeypatch.setattr("xmoe_fairseq.moe.native.routing.missing", lambda: "this is a GPU")
    made = ROUTERS[router](E)
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    config = torch._dynamo.config
    for call, tokens in enumerate((300, 290, 299, 200, 150)):
        x_TD, is_known = torch.randn(tokens, D), call > 1  # a budget has nothing to add to in the first
        with config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=is_known):
            routings = compiled(x_TD), made(x_TD)
        for name in ("token_R", "expert_R", "rank_R", "weight_R", "probs_TE"):
            assert torch.equal(*(getattr(routing, name) for routing in routings)), name
        losses = [routing.weight_R.sum() + routing.load_balance_loss for routing in routings]
        assert_same(*(torch.autograd.grad(loss, made.weight)[0] for loss in losses))
