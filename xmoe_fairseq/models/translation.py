"""xmoe_transformer: fairseq's encoder-decoder Transformer with MoE layers."""

from argparse import ArgumentParser
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import (
    tiny_architecture,
    transformer_iwslt_de_en,
    transformer_wmt_en_de,
    transformer_wmt_en_de_big,
)

from xmoe_fairseq.config import MoEConfig, read_moe_config
from xmoe_fairseq.initial import scale_routers
from xmoe_fairseq.model_config import complete_namespace, flat_transformer_config
from xmoe_fairseq.transformer_layers import install_experts

XMoETransformerConfig = flat_transformer_config("XMoETransformerConfig", MoEConfig)


@register_model("xmoe_transformer", dataclass=XMoETransformerConfig)
class XMoETransformerModel(TransformerModel):
    """Built as fairseq's Transformer; then every Nth layer gets experts (arXiv 2403.18926)."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        gen_parser_from_dataclass(parser, XMoETransformerConfig(), delete_default=True)

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "XMoETransformerModel":
        """Raises FlagError, naming the flag, if the configuration breaks a rule."""
        args = complete_namespace(cfg, XMoETransformerConfig, task)
        config = read_moe_config(args, sides=("encoder", "decoder"))
        model = super().build_model(args, task)
        install_experts(model, config, sides=("encoder", "decoder"))
        scale_routers(model, config.moe_router_init_scale)
        return model


_SIZES = {
    "tiny": tiny_architecture,
    "iwslt_de_en": transformer_iwslt_de_en,
    "wmt_en_de": transformer_wmt_en_de,
    "wmt_en_de_big": transformer_wmt_en_de_big,
}
for _size, _architecture in _SIZES.items():
    register_model_architecture("xmoe_transformer", f"xmoe_transformer_{_size}")(_architecture)
