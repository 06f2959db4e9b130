"""One MoE layer as the flags describe it."""

import torch.nn.functional as F
from fairseq import utils
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import gelu
from torch import nn

from xmoe_fairseq.config import MoEConfig, router_kind
from xmoe_fairseq.moe import CheapExperts, MoELayer, RoutedLayer, Router, TokenRouter
from xmoe_fairseq.moe.routers.cheap_flags import num_cheap
from xmoe_fairseq.moe.routers.registry import Place
from xmoe_fairseq.parallel.groups import ExpertParallel
from xmoe_fairseq.router_args import NAME, read_router_args
from xmoe_fairseq_compat.errors import FlagError

# What fairseq gives -> the same of torch's, which fast kernels know. Its gelu casts to fp32, in which torch's
# computes anyway; its swish is the class of a module, which its own layers fail to call.
TORCHS = {gelu: F.gelu, nn.SiLU: F.silu}


def build_moe(
    stack: nn.Module, config: MoEConfig, side: str, parallel: ExpertParallel | None, name: str, number: int
) -> RoutedLayer:
    """The `number`-th MoE layer of the model, the encoder's first."""
    cfg: TransformerConfig = stack.cfg
    ffn_dim = getattr(cfg, side).ffn_embed_dim
    activation = utils.get_activation_fn(cfg.activation_fn)
    common = {
        "model_dim": getattr(cfg, side).embed_dim,
        "expert_dim": ffn_dim // config.moe_ffn_split,
        "num_experts": config.moe_num_experts,
        "activation": TORCHS.get(activation, activation),
        "activation_dropout": float(cfg.activation_dropout or cfg.relu_dropout or 0.0),
        "dense_ffn_dim": ffn_dim,
        "name": name,
        "side": side,
    }
    kind = router_kind(config.moe_router)
    if issubclass(kind, RoutedLayer):  # a layer with a router and experts of its own
        return kind(**common, **read_router_args(config.moe_router, kind, config.moe_router_args))
    cheap = build_cheap(common["model_dim"], config)
    scored = config.moe_num_experts + num_cheap(config)
    place = Place(common["model_dim"], scored, config, stack.dictionary, number)
    return MoELayer(
        **common,
        router=build_router(place),
        capacity_factor=config.moe_capacity_factor,
        eval_capacity_factor=config.moe_eval_capacity_factor,
        min_capacity=config.moe_min_capacity,
        expert_parallel_group=parallel.expert_group if parallel else None,
        combine=config.moe_combine,
        kernel=config.moe_kernel,
        output_scale=config.moe_output_scale,
        shared_experts=config.moe_shared_experts,
        cheap=cheap,
    )


def build_cheap(model_dim: int, config: MoEConfig) -> CheapExperts | None:
    numbers = (config.moe_zero_experts, config.moe_copy_experts, config.moe_constant_experts)
    return CheapExperts(model_dim, *numbers, config.moe_cheap_balance) if any(numbers) else None


def build_router(place: Place) -> TokenRouter:
    """Raises FlagError if its name is unknown, or it refuses what --moe-router-args give."""
    config, kind = place.config, router_kind(place.config.moe_router)
    arguments = read_router_args(config.moe_router, kind, config.moe_router_args)
    try:
        router: TokenRouter = kind.from_config(place, **arguments)
    except ValueError as error:
        where = NAME if arguments else f"--moe-router {config.moe_router}"
        raise FlagError(f"{where}: {error}") from error
    if isinstance(router, Router):
        router.temperature = config.moe_router_temperature
        if config.moe_router_hidden_dim:
            router.score_by_hidden(config.moe_router_hidden_dim)
        router.balance_by(config.moe_balance, config.moe_balance_step)
    return router
