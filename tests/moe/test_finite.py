"""NaN and inf where tokens choose, as a GPU's host learns of them: late, but before anything comes of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from xmoe_fairseq.moe import (
    HashRouter,
    MoELayer,
    ReLURouter,
    RoutedLayer,
    ThresholdRouter,
    TopKRouter,
    check_finite,
    finite,
)
from xmoe_fairseq.moe.records import finite_so_far
from xmoe_fairseq.moe.routed_layer import real_tokens
from xmoe_fairseq.moe.routers.gshard import GShardLayer


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "can_read", lambda tensor: False)


def gshard() -> RoutedLayer:
    pytest.importorskip("fairscale")
    return GShardLayer(4, 3, 5, torch.relu, name="second")


LAYERS: list[Callable[[], RoutedLayer]] = [
    lambda: MoELayer(4, 3, 5, ThresholdRouter(4, 5), name="second"),
    lambda: MoELayer(4, 3, 5, TopKRouter(4, 5), name="second"),
    lambda: MoELayer(4, 3, 5, ReLURouter(4, 5), name="second"),
    lambda: MoELayer(4, 3, 5, HashRouter(4, 5, torch.arange(9) % 5), name="second"),
    gshard,
]


class Two(nn.Module):
    """Of which the second is fed with what a test likes."""

    def __init__(self, second: RoutedLayer) -> None:
        super().__init__()
        self.first, self.second = MoELayer(4, 3, 5, ThresholdRouter(4, 5), name="first"), second

    def forward(self, x_TD: Tensor, mask_T: Tensor | None = None) -> None:
        ids_T = torch.arange(len(x_TD))
        self.first(torch.ones_like(x_TD), mask_T, ids_T)
        self.second(x_TD, mask_T, ids_T)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_layer_is_named_once_when_it_is_asked_for(make: Callable[[], RoutedLayer], bad: float) -> None:
    model, x_TD = Two(make()), torch.randn(6, 4)
    model(x_TD)
    check_finite(model)
    x_TD[2, 1] = bad
    model(x_TD, torch.arange(6) == 2)  # padding may hold anything
    check_finite(model)
    model(x_TD)
    model(torch.randn(6, 4))
    assert torch.as_tensor(finite_so_far(model)).isnan()
    with pytest.raises(FloatingPointError, match="^second: router input or scores are NaN or inf$"):
        check_finite(model)
    assert finite_so_far(model) == 0
    check_finite(model)


def test_scores_of_which_no_output_tells() -> None:
    """NaN is not above 0: a ReLU router passes over such an expert. And large scores are finite."""
    layer = MoELayer(4, 3, 5, ReLURouter(4, 5))
    with torch.no_grad():
        layer.router.weight[:4] = 1e38
        y_TD, _ = layer(torch.full((6, 4), 0.5))
        check_finite(layer)
        layer.router.weight[4] = torch.nan
        y_TD, _ = layer(torch.randn(6, 4))
    assert y_TD.isfinite().all()
    with pytest.raises(FloatingPointError):
        check_finite(layer)


def test_an_overflow_in_fp16_training_is_the_loss_scalers() -> None:
    layer, x_TD = LAYERS[0]().half(), torch.full((6, 4), torch.inf).half()
    layer(x_TD)
    check_finite(layer)
    layer.eval()(x_TD)
    with pytest.raises(FloatingPointError):
        check_finite(layer)


def test_a_mask_that_changes_without_its_version_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "can_read", lambda tensor: tensor.is_cpu)
    mask_T = torch.zeros(3, dtype=torch.bool)
    assert real_tokens(mask_T).tolist() == [0, 1, 2]
    mask_T.numpy()[0] = True
    assert real_tokens(mask_T).tolist() == [1, 2]


def test_padding_is_looked_for_once_in_a_gpus_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "can_read", lambda tensor: False)
    mask_BL = torch.tensor([[False, True, False], [True, False, False]])
    found = real_tokens(mask_BL)
    assert found.tolist() == [0, 2, 4, 5] and real_tokens(mask_BL) is found
    of_view = real_tokens(mask_BL.t())
    assert of_view.tolist() == [0, 3, 4, 5] and real_tokens(mask_BL.t()) is of_view
    mask_BL[0, 0] = True
    assert real_tokens(mask_BL.t()).tolist() == [3, 4, 5]
    assert real_tokens(mask_BL[1:]).tolist() == [1, 2]
    layer, x = LAYERS[0](), torch.randn(2, 3, 4, requires_grad=True)
    with torch.inference_mode():
        layer(x, mask_BL)
    layer(x, mask_BL)[0].sum().backward()  # nothing is left of the inference
    with torch.inference_mode():
        mask_BL = mask_BL.clone()
        assert real_tokens(mask_BL).tolist() == [2, 4, 5]
        mask_BL.zero_()
        assert real_tokens(mask_BL).tolist() == [*range(6)]
