"""What a recomputation, which sees other scores, makes of a layer: the same experts and gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tolerances import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint, noop_context_fn

from xmoe_fairseq.moe import (
    BaseRouter,
    ExpertChoiceRouter,
    MoELayer,
    ReLURouter,
    RoutedLayer,
    ThresholdRouter,
    TopAnyRouter,
    TopKRouter,
    keep_scores,
)  # fmt: skip
from xmoe_fairseq.moe.routers.gshard import GShardLayer

SIZES = MODEL_DIM, NUM_EXPERTS = 8, 6
ROUTERS = {
    "threshold": partial(ThresholdRouter, *SIZES, 0.6),
    "probability": partial(ThresholdRouter, *SIZES, 0.2, rule="probability"),
    "topk": partial(TopKRouter, *SIZES, 2),
    "relu": partial(ReLURouter, *SIZES),
    "topany": partial(TopAnyRouter, *SIZES),
    "base": partial(BaseRouter, *SIZES),
    "expert_choice": partial(ExpertChoiceRouter, *SIZES, 2),
}


def make(router: str) -> RoutedLayer:
    torch.manual_seed(3)
    if router == "gshard":
        pytest.importorskip("fairscale")
        return GShardLayer(MODEL_DIM, 4, NUM_EXPERTS, torch.relu)
    return MoELayer(MODEL_DIM, 4, NUM_EXPERTS, ROUTERS[router](), activation_dropout=0.2)


def gradients(layer: RoutedLayer, loss_runs: int = 1, **how: Any) -> dict[str, Tensor]:
    torch.manual_seed(4)
    x_TD = torch.randn(40, MODEL_DIM, requires_grad=True)
    y_TD, routing = checkpoint(layer, x_TD, use_reentrant=False, **how) if how else layer(x_TD)
    loss = y_TD.sin().sum() + routing.load_balance_loss + 0.1 * routing.z_loss
    for run in range(loss_runs):
        loss.backward(retain_graph=run + 1 < loss_runs)
    return {"x": x_TD.grad, **{name: p.grad for name, p in layer.named_parameters() if p.grad is not None}}


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def disturb(layer: RoutedLayer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scores that are off in backward passes, and far more so than sums in another order are."""
    disturbed: list[int] = []

    def off(scores_TE: Tensor) -> Tensor:
        if not in_backward():
            return scores_TE
        disturbed.append(len(scores_TE))
        return scores_TE * 2 + 0.1

    if isinstance(layer, GShardLayer):
        gate: nn.Module = layer.gshard.gate.wg
        gate.register_forward_hook(lambda _, __, logits_SE: off(logits_SE), prepend=True)
    else:
        plain = layer.router.score
        monkeypatch.setattr(layer.router, "score", lambda x_TD: off(plain(x_TD)))
    return disturbed


@pytest.mark.parametrize("router", [*ROUTERS, "gshard"])
def test_a_recomputation_keeps_the_choice(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(router).train()
    disturbed = disturb(layer, monkeypatch)
    found = gradients(layer, context_fn=keep_scores)
    assert disturbed
    assert_same(found, gradients(make(router).train()))


@pytest.mark.parametrize("router", ["threshold", "relu", "topany"])
def test_without_it_torch_finds_other_sizes(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(router).train()
    disturb(layer, monkeypatch)
    with pytest.raises(CheckpointError, match="different metadata"):
        gradients(layer, context_fn=noop_context_fn)


def test_one_bit_at_the_threshold() -> None:
    """Six probabilities of 1/6 = tau; the last bit of a score puts the first of them below."""

    def layer(is_off: Callable[[], bool]) -> MoELayer:
        moe = MoELayer(MODEL_DIM, 4, NUM_EXPERTS, ThresholdRouter(*SIZES, sixth, rule="probability"))
        plain, last_bit_E = moe.router.score, torch.zeros(NUM_EXPERTS)
        last_bit_E[0] = 2.0**-22  # of numbers below 4
        moe.router.score = lambda x_TD: 0 * plain(x_TD) + (4 - last_bit_E * is_off())  # type: ignore[method-assign]
        return moe

    sixth = float(torch.tensor(1 / 6))
    x_TD = torch.ones(2, MODEL_DIM)
    assert [layer(lambda: off)(x_TD)[1].experts_per_token for off in (False, True)] == [6, 5]  # noqa: B023
    plain, recomputed = layer(lambda: False), layer(in_backward)
    recomputed.load_state_dict(plain.state_dict())
    assert_same(gradients(recomputed, context_fn=keep_scores), gradients(plain))


def test_two_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("threshold").train()
    disturb(layer, monkeypatch)
    assert_same(gradients(layer, 2, context_fn=keep_scores), gradients(make("threshold").train(), 2))


def test_several_layers_in_one_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which one runs twice; scores are kept by call."""

    def run(recompute: bool) -> dict[str, Tensor]:
        layers = [make("threshold").train(), make("topany").train()]
        if recompute:
            for layer in layers:
                disturb(layer, monkeypatch)
        x_TD = torch.randn(40, MODEL_DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()

        def stack(x_TD: Tensor) -> Tensor:
            for layer in (*layers, layers[0]):
                x_TD = x_TD + layer(x_TD)[0]
            return x_TD

        torch.manual_seed(4)
        y_TD = (
            checkpoint(stack, x_TD, use_reentrant=False, context_fn=keep_scores) if recompute else stack(x_TD)
        )
        y_TD.sin().sum().backward()
        named = [(f"{i} {name}", p) for i, layer in enumerate(layers) for name, p in layer.named_parameters()]
        return {"x": x_TD.grad, **{name: p.grad for name, p in named if p.grad is not None}}

    assert_same(run(True), run(False))
