"""What a training's arithmetic goes by: the model's widths, the batch, bytes of a number."""

from collections import Counter
from dataclasses import dataclass

Parts = Counter[str]  # numbers by part of a model


@dataclass(frozen=True)
class Stack:
    """An encoder or a decoder."""

    layers: int
    model_dim: int
    ffn_dim: int
    heads: int
    length: int  # tokens of a sentence
    memory_dim: int = 0  # of an encoder that it attends to; 0 = none
    unused: bool = False  # its dense layers hold a second copy of their weights, for fairseq's fast path
    prenorm: bool = False
    moe_freq: int = 0  # experts in every Nth layer; 0 = in none
    embedding_norm: bool = False
    learned_positions: int = 0

    @property
    def moe_layers(self) -> int:
        return self.layers // self.moe_freq if self.moe_freq else 0

    @property
    def dense_layers(self) -> int:
        return self.layers - self.moe_layers


@dataclass(frozen=True)
class Precision:
    """Bytes of a parameter. Adam's two averages are fp32 in all of them."""

    weight: int
    gradient: int
    master: int = 0  # an fp32 copy, and its gradient
    averages: int = 8

    def states(self, parts: Parts) -> int:
        """Of weights, gradients and Adam. An unused copy has no gradient; its fp32 copy has one of zeros."""
        used, unused = parts.total() - parts["unused copies"], parts["unused copies"]
        kept = self.master + self.averages * bool(self.master)
        return used * (self.weight + self.gradient + self.master + self.averages) + unused * (
            self.weight + kept
        )


# By fairseq's flags, of which the first counts; "" is fp32.
PRECISIONS = {
    "memory_efficient_bf16": Precision(2, 2), "memory_efficient_fp16": Precision(2, 2),
    "bf16": Precision(2, 2, 8), "fp16": Precision(2, 2, 8), "": Precision(4, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model, what of it a rank holds, and its batch."""

    stacks: tuple[Stack, ...]
    vocabulary: int
    embeddings: int  # matrices of V x embedding_dim, an output layer among them unless it is shared
    embedding_dim: int  # where it is not D, products come between
    sentences: int
    experts: int = 0
    split: int = 1
    shared_experts: int = 0
    cheap_experts: int = 0
    constant_experts: int = 0
    router: str = ""
    output_bias: bool = False
    held: int = 0  # experts on a rank
    relu: bool = True  # else gelu, for which fairseq keeps fp32
    dropout: float = 0.0
    activation_dropout: float = 0.0
    precision: Precision = PRECISIONS["bf16"]

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the forward pass."""
        return self.precision.weight

    def tokens(self, stack: Stack) -> int:
        return self.sentences * stack.length

    def expert_dim(self, stack: Stack) -> int:
        return stack.ffn_dim // self.split
