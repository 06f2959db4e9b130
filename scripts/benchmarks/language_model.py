"""A dense and a sparse language model with random weights, alike but for the FFNs, and text for them."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from xmoe_fairseq.models import XMoETransformerLanguageModel
from xmoe_fairseq.moe import moe_layers

VOCABULARY, HEADS = 8000, 8
LENGTH = 32  # tokens of a sentence that is scored
Models = tuple[Any, Any]


class Shape(NamedTuple):
    """Of a language model with random weights."""

    layers: int = 6
    dim: int = 512
    ffn: int = 8192
    experts: int = 32


def random_models(shape: Shape) -> Models:
    """(dense, sparse): alike but for the FFNs."""
    symbols = Dictionary()
    for i in range(VOCABULARY - len(symbols)):
        symbols.add_symbol(f"symbol{i}")
    task: Any = SimpleNamespace(
        source_dictionary=symbols, target_dictionary=symbols,
        cfg=Namespace(tokens_per_sample=512, max_target_positions=512),
    )  # fmt: skip
    size = {
        "decoder_layers": shape.layers, "decoder_embed_dim": shape.dim,
        "decoder_input_dim": shape.dim, "decoder_output_dim": shape.dim,
        "decoder_ffn_embed_dim": shape.ffn, "decoder_attention_heads": HEADS,
        "decoder_normalize_before": True, "dropout": 0.0,
        "share_decoder_input_output_embed": True,
    }  # fmt: skip
    experts = {
        "moe_freq": 1, "moe_num_experts": shape.experts, "moe_ffn_split": shape.experts,
        "moe_max_experts_per_token": 0, "moe_combine": "ones",
    }  # fmt: skip
    build = XMoETransformerLanguageModel.build_model
    dense, sparse = build(Namespace(**size, moe_freq=0), task), build(Namespace(**size, **experts), task)
    for layer in moe_layers(sparse):
        layer.router.weight.data.mul_(3.0)  # as decisive as a fitted one
    return dense.eval(), sparse.eval()


def inputs_of_shape(batch: int) -> dict[str, Tensor]:
    tokens = torch.randint(4, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(2))
    return {"src_tokens": tokens, "src_lengths": torch.full((batch,), LENGTH)}
