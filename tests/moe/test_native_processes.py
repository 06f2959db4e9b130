"""Layers with the native kernel in workers, threads, copies and files, and in compiled code."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from expert_calls import layer_values_and_gradients
from tolerances import assert_same
from torch import Tensor
from torch.utils.data import DataLoader

from xmoe_fairseq.moe import MoELayer, Routing, ThresholdRouter, TopKRouter
from xmoe_fairseq.moe import native as native_package
from xmoe_fairseq.moe.experts import native as kernel

pytestmark = pytest.mark.usefixtures("native_library")

TOKENS, BATCH = 96, 32
SECONDS = 300  # only what hangs takes so long


@pytest.fixture(params=["threshold", "topk"])
def layer(request: pytest.FixtureRequest) -> MoELayer:
    router = ThresholdRouter(32, 8, 0.6) if request.param == "threshold" else TopKRouter(32, 8, 2)
    return MoELayer(32, 64, 8, router, activation="gelu")


@pytest.fixture
def tokens() -> list[Tensor]:
    return list(torch.randn(TOKENS, 32).unbind())


def batches_of(tokens: list[Tensor]) -> list[list[Tensor]]:
    return [tokens[i : i + BATCH] for i in range(0, TOKENS, BATCH)]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str, layer: MoELayer, tokens: list[Tensor]) -> None:
    """After the process that starts them has used two threads. One of a batch is what one of all is."""
    torch.set_num_threads(2)
    expected = [layer_values_and_gradients(layer, batch) for batch in batches_of(tokens)]
    found = DataLoader(
        tokens, BATCH, num_workers=2, collate_fn=partial(layer_values_and_gradients, layer),
        multiprocessing_context=start, timeout=SECONDS,
    )  # fmt: skip
    assert_same(list(found), expected)


def test_threads_of_python_at_the_same_time(layer: MoELayer, tokens: list[Tensor]) -> None:
    expected = [layer_values_and_gradients(layer, batch) for batch in batches_of(tokens)]
    found: list[list[list[Tensor]]] = [[] for _ in range(4)]

    def compute(mine: list[list[Tensor]]) -> None:
        torch.set_num_threads(2)
        for _ in range(5):
            mine[:] = [layer_values_and_gradients(layer, batch) for batch in batches_of(tokens)]

    threads = [threading.Thread(target=compute, args=(mine,), daemon=True) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    for mine in found:
        assert_same(mine, expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_layer_that_has_been_used(way: str, layer: MoELayer, tokens: list[Tensor]) -> None:
    expected = layer_values_and_gradients(layer, tokens)
    other = copy.deepcopy(layer) if way == "deepcopy" else pickled(layer)
    assert type(other) is MoELayer
    for mine, first in zip(layer_values_and_gradients(other, tokens), expected, strict=True):
        assert torch.equal(mine, first)


def pickled(thing: object) -> object:
    return pickle.loads(pickle.dumps(thing))


def test_a_routing_is_pickled(layer: MoELayer, tokens: list[Tensor]) -> None:
    _, routing = layer(torch.stack(tokens))
    read = pickled(routing)
    assert isinstance(read, Routing)
    assert torch.equal(read.combine_weights(), routing.combine_weights())
    assert torch.equal(read.load_balance_loss, routing.load_balance_loss)


def test_the_same_bits_every_time(threads: int, layer: MoELayer, tokens: list[Tensor]) -> None:
    first, *others = (layer_values_and_gradients(layer, tokens) for _ in range(4))
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.fixture
def no_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise AssertionError("compiled code looks for a library")

    for module in (native_package, kernel):
        monkeypatch.setattr(module, "missing", refuse)
    monkeypatch.setattr("xmoe_fairseq.moe.native.routing.missing", refuse)


def test_compiled_layers(layer: MoELayer, tokens: list[Tensor], request: pytest.FixtureRequest) -> None:
    expected = layer_values_and_gradients(layer, tokens)
    request.getfixturevalue("no_native_call")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    assert_same(layer_values_and_gradients(compiled, tokens), expected)
