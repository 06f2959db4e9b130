"""xmoe_transformer_lm: fairseq's decoder-only Transformer with MoE layers."""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
    base_lm_architecture,
    transformer_lm_gpt,
    transformer_lm_gpt2_small,
)

from xmoe_fairseq.config import MoEConfig, read_moe_config
from xmoe_fairseq.initial import draw_normal, scale_routers
from xmoe_fairseq.model_config import complete_namespace
from xmoe_fairseq.transformer_layers import install_experts
from xmoe_fairseq_compat.errors import FlagError


@dataclass
class XMoETransformerLanguageModelConfig(MoEConfig, TransformerLanguageModelConfig):
    init_std: float = field(
        default=0.0,
        metadata={"help": "draw all weights from a normal distribution of this width (the paper: 0.014); "
                  "0 = as fairseq does"},
    )  # fmt: skip


@register_model("xmoe_transformer_lm", dataclass=XMoETransformerLanguageModelConfig)
class XMoETransformerLanguageModel(TransformerLanguageModel):
    """Built as fairseq's language model; then every Nth layer gets experts (arXiv 2403.18926)."""

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "XMoETransformerLanguageModel":
        """Raises FlagError, naming the flag, if the configuration breaks a rule."""
        args = complete_namespace(cfg, XMoETransformerLanguageModelConfig, task)
        config = read_moe_config(args, sides=("decoder",))
        if not 0 <= args.init_std < float("inf"):
            raise FlagError(f"--init-std must be 0 (as fairseq does) or more, got {args.init_std}")
        model = super().build_model(args, task)
        install_experts(model, config, sides=("decoder",))
        if args.init_std:
            draw_normal(model, args.init_std)
        scale_routers(model, config.moe_router_init_scale)
        return model


@register_model_architecture("xmoe_transformer_lm", "xmoe_transformer_lm_tiny")
def xmoe_transformer_lm_tiny(args: Namespace) -> None:
    args.decoder_embed_dim = getattr(args, "decoder_embed_dim", 64)
    args.decoder_ffn_embed_dim = getattr(args, "decoder_ffn_embed_dim", 256)
    args.decoder_layers = getattr(args, "decoder_layers", 2)
    args.decoder_attention_heads = getattr(args, "decoder_attention_heads", 2)
    base_lm_architecture(args)


# fairseq's names are one size off: its gpt has the shape of GPT-2 small (12 layers, width 768), its
# gpt2_small that of GPT-2 medium (24 layers, width 1024).
register_model_architecture("xmoe_transformer_lm", "xmoe_transformer_lm_gpt2_small")(transformer_lm_gpt)
register_model_architecture("xmoe_transformer_lm", "xmoe_transformer_lm_gpt2_medium")(
    transformer_lm_gpt2_small
)
