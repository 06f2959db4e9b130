"""One test per patch of training.py that no command shows more simply."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.nan_detector import NanDetector
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import FairseqTask
from torch import Tensor, nn


@dataclass
class Record:
    weight: Tensor


class Odd(nn.Module):
    """A module whose output torch's own backward hooks cannot take."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.linear, self.output = nn.Linear(2, 2), output

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return {"record": Record(y), "empty": {}, "nested": (y, [None, {"y": y}])}[self.output]


@pytest.mark.parametrize("output", ["record", "empty", "nested"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e30])
def test_the_parameter_whose_gradient_is_not_finite_is_named(output: str, factor: float) -> None:
    model = nn.ModuleDict({"fine": nn.Linear(2, 2), "odd": Odd(output)})
    with pytest.raises(FloatingPointError) as error, NanDetector(model):
        model["odd"](torch.ones(1, 2))
        loss = model["fine"](torch.ones(1, 2)).sum() + (model["odd"].linear(torch.ones(1, 2)) * factor).sum()
        loss.backward()
    assert str(error.value).startswith(
        "gradients of 2 of 4 parameters are NaN, inf or too large for their norm, the first odd.linear.weight"
    )
    found = "detected in output of odd.linear, shape: torch.Size([1, 2]), backward)" in str(error.value)
    assert found == (factor != 1e30)  # each number is finite, the sum of squares is not


def test_gradients_of_any_output_are_watched() -> None:
    model = Odd("nested")
    with NanDetector(model) as detector:
        model(torch.ones(1, 2))[1][1]["y"].mul(float("nan")).sum().backward(inputs=[model.linear.bias])
        model.zero_grad()
    assert detector.first_found.startswith("NaN detected in output of ")


def test_what_led_to_the_search_is_said_too() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(
        FloatingPointError, match=r"^Minimum loss scale reached \(0.0001\); gradients of 2 of 2"
    ):
        try:
            raise FloatingPointError("Minimum loss scale reached (0.0001). Your loss is probably exploding.")
        except FloatingPointError:
            with NanDetector(model):
                (model(torch.ones(1, 2)) * float("nan")).sum().backward()
            raise


def test_finite_gradients_are_no_error() -> None:
    model = Odd("record")
    with NanDetector(model):
        model(torch.ones(1, 2)).weight.sum().backward()


def test_amp_computes_in_bf16_on_a_cpu() -> None:
    """autocast_on_cpu"""
    seen = []

    class Model(nn.Linear):
        def set_num_updates(self, number: int) -> None:
            pass

    def criterion(model: Model, sample: torch.Tensor) -> tuple[torch.Tensor, int, dict]:
        y = model(sample)
        seen.append(y.dtype)
        return y.sum(), 1, {}

    for optimizer in (object.__new__(AMPOptimizer), SimpleNamespace()):
        optimizer.backward = lambda loss: None
        FairseqTask(None).train_step(torch.ones(1, 2), Model(2, 2), criterion, optimizer, 0)
    assert seen == [torch.bfloat16, torch.float32]
