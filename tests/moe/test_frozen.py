"""What is frozen costs nothing: matrix products are counted, not timed, and gradients compared."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
TOKENS, EXPERTS = 40, 4


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each kind of matrix product runs inside the `with` block."""
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            counts[name] += name in PRODUCTS
            return function(*args, **(kwargs or {}))

    with Count():
        yield counts


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


def gradients(layer: MoELayer, x_TD: Tensor) -> dict[str, Tensor | None]:
    y_TD, _ = layer(x_TD)
    with counted() as counts:
        (y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)).sum().backward()
    stacks = {name: stack.grad for name, stack in layer.experts.named_parameters()}
    found = {"x": x_TD.grad, "router": layer.router.weight.grad, **stacks}
    return {**found, "products": torch.tensor(float(counts.total()))}


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
    got = gradients(*layer_and_tokens(trained, activation, combine))
    with use_kernel("plain"):
        expected = gradients(*layer_and_tokens(trained, activation, combine))
    for part in PARTS:
        assert (got[part] is not None) == (part in trained) == (expected[part] is not None)
        if part in trained:
            assert_same(got[part], expected[part])


@pytest.mark.parametrize(
    "trained, per_expert",
    [
        ({"router"}, 2),  # through fc2, and its bias
        ({"x"}, 3),  # through fc2 and fc1; and the weights, by which it is routed, depend on it
        ({"fc1_weight"}, 2),
        ({"fc1_bias"}, 1),
        ({"fc2_weight"}, 1),
        ({"fc2_bias"}, 1),
        ({"x", "router"}, 3),
        (set(PARTS[2:]), 4),
        (set(PARTS), 6),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else None,
)
def test_frozen_parts_cost_no_product(trained: set[str], per_expert: int) -> None:
    with use_kernel("loop"):  # the native kernel's products pass torch's dispatcher by
        counted_products = gradients(*layer_and_tokens(trained, F.relu, "probs"))["products"]
    of_router = ("router" in trained) + ("x" in trained)
    assert counted_products == per_expert * EXPERTS + of_router


def test_nothing_is_kept_where_nothing_is_trained() -> None:
    layer, x_TD = layer_and_tokens(set(), F.relu, "probs")
    y_TD, _ = layer(x_TD)
    assert isinstance(layer.experts, Experts) and y_TD.grad_fn is None and not y_TD.requires_grad
