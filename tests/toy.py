"""Small models and batches for the plugin's tests."""

import copy
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor

import xmoe_fairseq  # noqa: F401  (registers the models)
from xmoe_fairseq.models import XMoETransformerLanguageModel, XMoETransformerModel

PAD, EOS = 1, 2


def dictionary(size: int) -> Dictionary:
    symbols = Dictionary()
    for i in range(size - len(symbols)):
        symbols.add_symbol(f"symbol{i}")
    return symbols


def task(vocab_size: int = 40) -> Any:
    symbols = dictionary(vocab_size)
    return SimpleNamespace(
        source_dictionary=symbols,
        target_dictionary=symbols,
        cfg=Namespace(tokens_per_sample=64, max_target_positions=64),
    )


def translation_model(vocab_size: int = 40, **overrides: Any) -> XMoETransformerModel:
    cfg = {
        "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48, "encoder_layers": 4, "decoder_layers": 3,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "share_decoder_input_output_embed": True,
        "dropout": 0.0, "moe_num_experts": 8, "moe_ffn_split": 2,
    }  # fmt: skip
    return XMoETransformerModel.build_model(Namespace(**cfg | overrides), task(vocab_size))


def language_model(vocab_size: int = 40, **overrides: Any) -> XMoETransformerLanguageModel:
    cfg = {
        "decoder_embed_dim": 32, "decoder_input_dim": 32, "decoder_output_dim": 32,
        "decoder_ffn_embed_dim": 48, "decoder_layers": 3, "decoder_attention_heads": 4,
        "decoder_normalize_before": True, "dropout": 0.0, "moe_num_experts": 8, "moe_ffn_split": 2,
    }  # fmt: skip
    return XMoETransformerLanguageModel.build_model(Namespace(**cfg | overrides), task(vocab_size))


def sentences(lengths: list[int], vocab_size: int = 40, left_pad: bool = False, width: int = 0) -> Tensor:
    """(batch, width) random tokens, each row ended by EOS and padded."""
    width = max(width, *lengths)
    rows = []
    for length in lengths:
        words = torch.randint(4, vocab_size, (length - 1,))
        row, padding = torch.cat([words, torch.tensor([EOS])]), torch.full((width - length,), PAD)
        rows.append(torch.cat([padding, row] if left_pad else [row, padding]))
    return torch.stack(rows)


def shift_right(target: Tensor) -> Tensor:
    """Teacher forcing: what the decoder reads to predict right-padded `target`."""
    previous = torch.full_like(target, PAD)
    previous[:, 0] = EOS
    previous[:, 1:] = target[:, :-1].masked_fill(target[:, :-1] == EOS, PAD)
    return previous.masked_fill(target == PAD, PAD)


def translation_sample(source: Tensor, target: Tensor) -> dict[str, Any]:
    return {
        "net_input": {
            "src_tokens": source,
            "src_lengths": source.ne(PAD).sum(dim=1),
            "prev_output_tokens": shift_right(target),
        },
        "target": target,
        "ntokens": int(target.ne(PAD).sum()),
    }


def language_sample(target: Tensor) -> dict[str, Any]:
    return {
        "net_input": {"src_tokens": shift_right(target), "src_lengths": target.ne(PAD).sum(dim=1)},
        "target": target,
        "ntokens": int(target.ne(PAD).sum()),
    }


def encoder_layer() -> TransformerEncoderLayerBase:
    cfg = copy.deepcopy(TransformerConfig())  # its parts are one for all of them
    cfg.encoder.embed_dim, cfg.encoder.ffn_embed_dim, cfg.encoder.attention_heads = 8, 8, 2
    return TransformerEncoderLayerBase(cfg)
