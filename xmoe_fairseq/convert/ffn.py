"""The FFNs of a dense model: their weights, and the tokens that go into them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fairseq import utils
from torch import Tensor, nn

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.moe.experts.kernels import Activation


@dataclass(frozen=True, eq=False)
class FeedForward:
    """`fc2(activation(fc1(x)))` with inner width F and outer width D."""

    name: str  # of its layer, such as decoder.layers.0
    layer: Any  # fairseq's
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


def feed_forwards(model: nn.Module, sides: tuple[str, ...], freq: int) -> list[FeedForward]:
    """Of every `freq`-th layer of each side, counted from 1."""
    found = []
    for side in sides:
        stack: Any = getattr(model, side)
        activation = utils.get_activation_fn(stack.cfg.activation_fn)
        for index in range(freq - 1, len(stack.layers), freq):
            layer = stack.layers[index]
            fc1, fc2 = layer.fc1, layer.fc2
            weights = (fc1.weight.detach(), fc1.bias.detach(), fc2.weight.detach(), fc2.bias.detach())
            found.append(FeedForward(f"{side}.layers.{index}", layer, *weights, activation))
    return found


def feed(
    model: nn.Module, ffns: list[FeedForward], batches: Batches, consume: Callable[..., Any], progress: Any
) -> None:
    """Run the model on all batches; `consume` gets every FFN's input, (T, D) without padding, once a batch.

    Args:
        progress: tqdm; moves on by the number of target tokens.
    """
    pad = batches.task.target_dictionary.pad()
    real: dict[
        str, Tensor
    ] = {}  # of each side, (length, batch) bool as its layers get it: what is no padding

    def keep(ffn: FeedForward, _: nn.Module, inputs: tuple[Tensor]) -> None:
        consume(ffn, inputs[0][real[ffn.side]])

    handles = [ffn.layer.fc1.register_forward_pre_hook(partial(keep, ffn)) for ffn in ffns]
    try:
        with torch.no_grad():
            for sample in batches:
                inputs = sample["net_input"]
                source = inputs["src_tokens"]
                for side, ids in (("encoder", source), ("decoder", inputs.get("prev_output_tokens", source))):
                    real[side] = ids.ne(pad).t()
                model(**inputs, features_only=True)  # without the output projection
                progress.update(sample["ntokens"])
    finally:
        for handle in handles:
            handle.remove()
