"""What is frozen costs nothing: matrix products are counted, not timed, and gradients compared."""

from collections.abc import Callable
from itertools import compress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xmoe_fairseq.moe import Experts, MoELayer, TopKRouter, use_kernel

PRODUCTS = ("mm", "addmm", "mv", "addmv", "bmm", "baddbmm", "addmm_", "addmv_")
PARTS = ("x", "router", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
INPUTS = ("x", "weight", *PARTS[2:])  # of a kernel
TOKENS, EXPERTS = 40, 4


class Calls(TorchDispatchMode):
    """What runs inside the `with` block: how many matrix products; what the native kernel is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.asked, self.given = 0, set(), set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket.__name__ in PRODUCTS
        if function is torch.ops.xmoe.expert_gradients.default:
            self.asked |= set(compress(INPUTS, args[-1]))
            self.given |= {name for name, grad in zip(INPUTS, result, strict=True) if grad is not None}
        return result


def layer_and_tokens(trained: set[str], activation: Callable, combine: str) -> tuple[MoELayer, Tensor]:
    torch.manual_seed(4)
    layer = MoELayer(6, 5, EXPERTS, TopKRouter(6, EXPERTS, 2), activation=activation, combine=combine)
    nn.init.normal_(layer.experts.fc2_bias)
    if layer.output_bias is not None:
        layer.output_bias.requires_grad_(False)
    layer.router.weight.requires_grad_("router" in trained)
    for name, stack in layer.experts.named_parameters():
        stack.requires_grad_(name in trained)
    return layer, torch.randn(TOKENS, 6).requires_grad_("x" in trained)


def gradients(layer: MoELayer, x_TD: Tensor) -> tuple[dict[str, Tensor | None], Calls]:
    y_TD, _ = layer(x_TD)
    with Calls() as calls:
        (y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)).sum().backward()
    stacks = {name: stack.grad for name, stack in layer.experts.named_parameters()}
    return {"x": x_TD.grad, "router": layer.router.weight.grad, **stacks}, calls


@pytest.mark.parametrize("combine", ["probs", "ones"])
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
@pytest.mark.parametrize(
    "trained",
    [
        {"x"},
        {"router"},
        {"x", "router"},
        *({part} for part in PARTS[2:]),
        set(PARTS) - {"router"},
        set(PARTS),
    ],
    ids=lambda parts: "+".join(sorted(parts)),
)
def test_only_what_is_trained_gets_a_gradient(trained: set[str], activation: Callable, combine: str) -> None:
    got, _ = gradients(*layer_and_tokens(trained, activation, combine))
    with use_kernel("plain"):
        expected, _ = gradients(*layer_and_tokens(trained, activation, combine))
    for part in PARTS:
        assert (got[part] is not None) == (part in trained) == (expected[part] is not None)
        if part in trained:
            assert_same(got[part], expected[part])


PRODUCTS_OF = {  # what is trained: products of an expert, in plain autograd
    "router": 0,  # through what the experts gave
    "x": 2,  # through fc2 and fc1; and the weights, by which it is routed, depend on it
    "fc1_weight": 2,
    "fc1_bias": 1,
    "fc2_weight": 1,
    "fc2_bias": 0,
    "x router": 2,
    " ".join(PARTS[2:]): 3,
    " ".join(PARTS): 4,
}


@pytest.mark.parametrize("trained", PRODUCTS_OF)
def test_frozen_parts_cost_no_product(trained: str) -> None:
    parts = set(trained.split())
    with use_kernel("plain"):
        _, calls = gradients(*layer_and_tokens(parts, F.relu, "probs"))
    assert calls.products == PRODUCTS_OF[trained] * EXPERTS + len(parts & {"x", "router"})
    assert not calls.asked


@pytest.mark.parametrize("trained", PRODUCTS_OF)
@pytest.mark.usefixtures("native_library")
def test_the_native_kernel_is_asked_for_what_is_trained_and_gives_nothing_else(trained: str) -> None:
    """Its own products pass torch's dispatcher by."""
    parts = set(trained.split())
    _, calls = gradients(*layer_and_tokens(parts, F.relu, "probs"))
    of_router = parts & {"x", "router"}
    assert calls.asked == calls.given == (parts & {*INPUTS}) | ({"weight"} if of_router else set())
    assert calls.products == len(of_router)


def test_nothing_is_kept_where_nothing_is_trained() -> None:
    layer, x_TD = layer_and_tokens(set(), F.relu, "probs")
    y_TD, _ = layer(x_TD)
    assert isinstance(layer.experts, Experts) and y_TD.grad_fn is None and not y_TD.requires_grad
