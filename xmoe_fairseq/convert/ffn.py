"""The FFNs of a dense model: their weights, and the tokens that go into them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fairseq import utils
from torch import Tensor, nn

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.moe.experts.kernels import Activation
from xmoe_fairseq.thresholds.measure import Place


@dataclass(frozen=True, eq=False)
class FeedForward:
    """`fc2(activation(fc1(x)))` with inner width F and outer width D."""

    name: str  # of its layer, such as decoder.layers.0
    layer: nn.Module
    fc1_weight: Tensor  # (F, D)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (D, F)
    fc2_bias: Tensor
    activation: Activation

    @property
    def side(self) -> str:
        return self.name.split(".")[0]

    def hidden(self, x_TD: Tensor) -> Tensor:
        return self.activation(torch.addmm(self.fc1_bias, x_TD, self.fc1_weight.t()))


def feed_forwards(model: nn.Module, sides: tuple[str, ...]) -> list[FeedForward]:
    found = []
    for side in sides:
        stack: Any = getattr(model, side)
        activation = utils.get_activation_fn(stack.cfg.activation_fn)
        for index, layer in enumerate(stack.layers):
            w1, b1 = layer.fc1.weight.detach(), layer.fc1.bias.detach()
            w2, b2 = layer.fc2.weight.detach(), layer.fc2.bias.detach()
            found.append(FeedForward(f"{side}.layers.{index}", layer, w1, b1, w2, b2, activation))
    return found


def dense_places(ffns: list[FeedForward]) -> list[Place]:
    layers: list[Any] = [ffn.layer for ffn in ffns]
    return [(layer.fc1, layer.fc2) for layer in layers]


Consumer = Callable[[FeedForward, Tensor], None]


def feed(
    model: nn.Module, ffns: list[FeedForward], batches: Batches, consume: Consumer, progress: Any
) -> None:
    """Run the model on all batches; `consume` gets every FFN's input, (T, D) without padding, once a batch.

    Args:
        progress: tqdm; moves on by the number of target tokens.
    """
    pad = batches.task.target_dictionary.pad()
    with torch.no_grad():
        for sample in batches:
            with inputs_to(ffns, partial(real_tokens, sample, pad=pad), consume):
                model(**sample["net_input"], features_only=True)  # without the output projection
            progress.update(sample["ntokens"])


@contextmanager
def inputs_to(ffns: list[FeedForward], real: Callable[..., Tensor], consume: Consumer) -> Iterator[None]:
    def keep(ffn: FeedForward, _: nn.Module, inputs: tuple[Tensor]) -> None:
        consume(ffn, inputs[0][real(side=ffn.side)])

    handles = [ffn.layer.fc1.register_forward_pre_hook(partial(keep, ffn)) for ffn in ffns]  # type: ignore
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def real_tokens(sample: dict[str, Any], side: str, pad: int) -> Tensor:
    """(length, batch) bool: what is not padding, as the layers of a side get it."""
    inputs = sample["net_input"]
    ids = inputs["prev_output_tokens"] if side == "decoder" and "prev_output_tokens" in inputs else None
    ids = inputs["src_tokens"] if ids is None else ids
    return ids.ne(pad).transpose(0, 1)
