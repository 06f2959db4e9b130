"""fairseq's Adam on a CPU."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fairseq.optim.adam import Adam
from torch import Tensor, nn

PLAIN: Callable[..., Any] = Adam.step.__wrapped__
SHAPES = ((7, 5), (33,), (4, 3, 2))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(step: Callable[..., Any], params: list[nn.Parameter], updates: int = 6, **options: Any) -> Adam:
    """The last parameter joins late, and the first one pauses, so their numbers of updates differ."""
    generator = torch.Generator().manual_seed(2)
    optimizer = Adam(params, **{"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-3, "weight_decay": 0.1} | options)
    for update in range(updates):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator)
            is_left_out = (i == 2 and update < 2) or (i == 0 and update == 3)
            p.grad = None if is_left_out else grad.to(p.dtype)
        step(optimizer)
    return optimizer


def assert_alike(ours: Adam, theirs: Adam) -> None:
    for (p, state), (q, other) in zip(ours.state.items(), theirs.state.items(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert state.keys() == other.keys()
        assert type(state["step"]) is int and state["step"] == other["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], other[name], rtol=1e-5, atol=1e-7)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each call of torch's fused update got."""
    calls: list[int] = []
    plain = torch._fused_adamw_

    def count(params: list[Tensor], *args: Any, **kwargs: Any) -> None:
        calls.append(len(params))
        plain(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", count)
    return calls


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"eps": 1e-8}], ids=str)
def test_one_pass_gives_the_same(options: dict[str, Any], fused: list[int]) -> None:
    assert_alike(train(Adam.step, parameters(), **options), train(PLAIN, parameters(), **options))
    # Updates 1 and 3 have a parameter that is new, and are fairseq's own; then no two have made equally many.
    assert fused == [2, *[1, 1], *[1, 1, 1], *[1, 1, 1]]


def test_a_state_of_one_way_goes_on_the_other(fused: list[int]) -> None:
    ours = train(Adam.step, ps := parameters())
    theirs = Adam(parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for p, q in zip(ps, theirs.param_groups[0]["params"], strict=True):
        q.data.copy_(p.data)
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    ours.step()
    PLAIN(theirs)
    assert_alike(ours, theirs)


@pytest.mark.parametrize("case", ["amsgrad", "bfloat16", "strided"])
def test_what_is_not_plain_fp32_goes_fairseqs_way(case: str, fused: list[int]) -> None:
    def made() -> list[nn.Parameter]:
        if case == "strided":
            return [nn.Parameter(p.detach().transpose(0, -1)) for p in parameters()]
        return parameters(torch.bfloat16 if case == "bfloat16" else torch.float32)

    options = {"amsgrad": case == "amsgrad"}
    ours, theirs = train(Adam.step, made(), **options), train(PLAIN, made(), **options)
    assert fused == []
    for p, q in zip(ours.state, theirs.state, strict=True):
        assert torch.equal(p, q)
