"""A layer on the device against the same layer in fp64 on a CPU: output, choice and every gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_check.budgets import as_on_a_gpu
from gpu_check.outcomes import Case, Check, Failed, Found
from xmoe_fairseq.moe import MoELayer, ThresholdRouter, TopKRouter, use_kernel

# Of parameters and tokens, and autocast's.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "fp16 autocast": (torch.float32, torch.float16),
}
# Norm of the error over the norm: a few times what rounding each number once gives, and sums in any order.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DROPOUT = 0.25
Tensors = dict[str, Tensor]


class Shape(NamedTuple):
    tokens: int = 300
    model_dim: int = 64
    expert_dim: int = 32
    experts: int = 8
    padding: int = 0  # tokens of these
    capacity_factor: float = 0.0
    scores: dict[int, float] = {}  # which all tokens give these experts beside their own


SHAPES = {
    "balanced": Shape(),
    "experts without tokens": Shape(scores={2: -30.0, 5: -30.0}),
    "one expert has all": Shape(scores={1: 5.0}),
    "no tokens": Shape(tokens=0),
    "one token": Shape(tokens=1),
    "padding": Shape(padding=70),
    "capacity": Shape(capacity_factor=1.0),
    "odd widths": Shape(model_dim=33, expert_dim=17),
    "1100 experts": Shape(tokens=64, model_dim=16, expert_dim=16, experts=1100),
}


def checks(case: Case) -> Iterator[Check]:
    for name, shape in SHAPES.items():
        yield Check(f"layer {name}", partial(in_each_precision, partial(errors, shape), case.device))
    yield Check("layer dropout", partial(in_each_precision, dropout_errors, case.device))


def in_each_precision(measure: Any, device: torch.device) -> Found:
    found, bad = {}, []
    for name, (dtype, autocast) in PRECISIONS.items():
        found[name] = measure(device, dtype, autocast)
        worst = max(found[name], key=lambda key: found[name][key])
        limit = LIMITS[autocast or dtype]
        if not found[name][worst] <= limit:  # NaN too
            bad.append(f"{name}: {worst} is off by {found[name][worst]:.1e} of its norm, limit {limit:.0e}")
    if bad:
        raise Failed("; ".join(bad), found)
    return Found(", ".join(f"{name} {max(each.values()):.0e}" for name, each in found.items()), found)


def errors(
    shape: Shape, device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None
) -> dict[str, float]:
    """By tensor, relative to its norm."""
    layer, x_TD = decided(shape, dtype, autocast or dtype)
    exact = layer_of(shape).double()
    exact.load_state_dict(layer.state_dict())
    mask_T = torch.arange(shape.tokens) < shape.padding if shape.padding else None
    grad_TD = torch.randn(x_TD.shape) + 0.3  # with a mean: a sum that loses its small terms shows
    with use_kernel("plain"):
        expected = tensors_of(exact, x_TD.double(), mask_T, grad_TD.double())
    with as_a_gpu(device, autocast):
        mask_T = None if mask_T is None else mask_T.to(device)
        got = tensors_of(layer.to(device), x_TD.to(device), mask_T, grad_TD.to(device))
    chosen, expected_choice = got.pop("choice"), expected.pop("choice")
    if not torch.equal(chosen, expected_choice):
        wrong = int((chosen != expected_choice).any(1).sum())
        raise Failed(f"{wrong} of {len(chosen)} tokens chose other experts than in fp64")
    return {name: error(got[name], expected[name]) for name in expected}


@contextmanager
def as_a_gpu(device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
    """By the kernel and the code that a GPU takes, also on a CPU."""
    is_autocast = autocast is not None
    with as_on_a_gpu(), use_kernel("grouped"), torch.autocast(device.type, autocast, enabled=is_autocast):
        yield


def layer_of(shape: Shape) -> MoELayer:
    sizes = shape.model_dim, shape.expert_dim, shape.experts
    router = ThresholdRouter(shape.model_dim, shape.experts, 0.5, 4)
    return MoELayer(*sizes, router, capacity_factor=shape.capacity_factor)


def decided(shape: Shape, dtype: torch.dtype, rounded: torch.dtype) -> tuple[MoELayer, Tensor]:
    """A layer and tokens, of which none chooses so narrowly that rounding could decide. All numbers are
    rounded already to what is computed in, so that no unit of a ReLU changes sides."""
    for seed in range(1, 100):
        torch.manual_seed(seed)
        layer, x_TD = layer_of(shape), torch.randn(shape.tokens, shape.model_dim)
        x_TD[:, -1] = 1
        with torch.no_grad():
            for expert, score in shape.scores.items():
                layer.router.weight[expert, -1] = score
        layer, x_TD = layer.to(rounded).to(dtype), x_TD.to(rounded).to(dtype)
        probe = layer_of(shape).double()
        choices = []
        for noise in (0.0, 1e-5, 1e-5):
            probe.load_state_dict(layer.state_dict())
            with torch.no_grad():
                weight_ED = dict(probe.router.named_parameters())["weight"]
                weight_ED.mul_(1 + noise * torch.randn_like(weight_ED))
                choices.append(probe.limit(probe.router(x_TD.double())).combine_weights() != 0)
        if all(torch.equal(choice, choices[0]) for choice in choices):
            return layer, x_TD
    raise Failed("found no tokens that choose clearly")


def tensors_of(
    layer: MoELayer, x_TD: Tensor, mask_T: Tensor | None, grad_TD: Tensor, balance: float = 1.0
) -> Tensors:
    """Output, choice, and gradients by what they are of, on the CPU; of the balance loss times `balance`."""
    x_TD = x_TD.detach().requires_grad_()
    y_TD, routing = layer(x_TD, mask_T)
    wide = torch.promote_types(y_TD.dtype, torch.float32)
    ((y_TD.to(wide) * grad_TD.to(wide)).sum() + balance * routing.load_balance_loss).backward()
    named = {"x": x_TD, **dict(layer.named_parameters())}
    grads = {
        f"gradient of {name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in named.items()
    }
    found = {"output": y_TD.detach(), "choice": routing.combine_weights().detach() != 0, **grads}
    return {name: tensor.cpu() for name, tensor in found.items()}


def error(got: Tensor, expected: Tensor) -> float:
    norm = expected.double().norm()
    return float((got.double() - expected.double()).norm() / (norm if norm > 0 else 1.0))


def dropout_errors(
    device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None
) -> dict[str, float]:
    """Experts whose output is their hidden units show which of them dropout takes: by the same seed of torch
    the same ones are taken from others."""
    tokens, width, experts, rounded = 200, 32, 4, autocast or dtype
    torch.manual_seed(1)
    router = TopKRouter(width, experts, 1)
    layer, seen = (MoELayer(width, width, experts, router, activation_dropout=DROPOUT) for _ in range(2))
    for each in (layer, seen):
        each.to(rounded).to(dtype)
    x_TD, grad_TD = torch.randn(tokens, width).to(rounded).to(dtype), torch.randn(tokens, width) + 0.3
    with torch.no_grad():
        for parameter, value in zip(seen.experts.stacked(), (0, 1, torch.eye(width), 0), strict=True):
            parameter.copy_(torch.as_tensor(value))
    found = []
    for each in (seen, layer):
        torch.manual_seed(2)
        each.zero_grad()  # they share a router
        with as_a_gpu(device, autocast):
            found.append(tensors_of(each.to(device), x_TD.to(device), None, grad_TD.to(device)))
    keep_TF = found[0]["output"] != 0
    share = float(keep_TF.double().mean())
    if abs(share - (1 - DROPOUT)) > 5 * (DROPOUT * (1 - DROPOUT) / keep_TF.numel()) ** 0.5:
        raise Failed(f"dropout {DROPOUT} keeps {share:.3f} of the units")
    expected = with_dropout(layer.cpu().double(), x_TD.double(), keep_TF, grad_TD.double())
    return {name: error(found[1][name], expected[name]) for name in expected}


def with_dropout(layer: MoELayer, x_TD: Tensor, keep_TF: Tensor, grad_TD: Tensor) -> Tensors:
    """As `tensors_of`, where every token has one expert and these hidden units."""
    layer.zero_grad()
    x_TD.requires_grad_()
    routing = layer.router(x_TD)
    expert_T = torch.empty_like(routing.expert_R).index_copy(0, routing.token_R, routing.expert_R)
    weight_T = routing.combine_weights().sum(1)
    w1, b1, w2, b2 = (stack[expert_T] for stack in layer.experts.stacked())
    hidden_TF = torch.relu(torch.einsum("tfd,td->tf", w1, x_TD) + b1) * keep_TF / (1 - DROPOUT)
    y_TD = (torch.einsum("tdf,tf->td", w2, hidden_TF) + b2) * weight_T.unsqueeze(1)
    ((y_TD * grad_TD).sum() + routing.load_balance_loss).backward()
    named = {"x": x_TD, **dict(layer.named_parameters())}
    return {"output": y_TD.detach(), **{f"gradient of {name}": leaf.grad for name, leaf in named.items()}}
