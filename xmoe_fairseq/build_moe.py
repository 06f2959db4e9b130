"""One MoE layer as the flags describe it."""

from fairseq import utils
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerConfig
from torch import Tensor, nn

from xmoe_fairseq.config import MoEConfig
from xmoe_fairseq.flags import HASH_TABLES, ROUTERS
from xmoe_fairseq.moe import (
    BaseRouter,
    ExpertChoiceRouter,
    HashRouter,
    MoELayer,
    Router,
    ThresholdRouter,
    TopKRouter,
    balanced_table,
    random_table,
)
from xmoe_fairseq.parallel import ExpertParallel
from xmoe_fairseq_compat.errors import FlagError


def build_moe(
    stack: nn.Module, config: MoEConfig, side: str, parallel: ExpertParallel | None, name: str
) -> MoELayer:
    cfg: TransformerConfig = stack.cfg
    model_dim, ffn_dim = getattr(cfg, side).embed_dim, getattr(cfg, side).ffn_embed_dim
    common = {
        "model_dim": model_dim,
        "expert_dim": ffn_dim // config.moe_ffn_split,
        "num_experts": config.moe_num_experts,
        "activation": utils.get_activation_fn(cfg.activation_fn),
        "activation_dropout": float(cfg.activation_dropout or cfg.relu_dropout or 0.0),
        "dense_ffn_dim": ffn_dim,
        "name": name,
    }
    if config.moe_router == "gshard":
        from xmoe_fairseq.moe.routers.gshard import GShardLayer  # fairscale's imports take a second

        return GShardLayer(**common)
    return MoELayer(
        **common,
        router=build_router(model_dim, config, stack.dictionary),
        capacity_factor=config.moe_capacity_factor,
        eval_capacity_factor=config.moe_eval_capacity_factor,
        min_capacity=config.moe_min_capacity,
        expert_parallel_group=parallel.expert_group if parallel else None,
        combine=config.moe_combine,
    )


def build_router(model_dim: int, config: MoEConfig, dictionary: Dictionary) -> Router | HashRouter:
    router = _build_router((model_dim, config.moe_num_experts), config, dictionary)
    if isinstance(router, Router):
        router.temperature = config.moe_router_temperature
    return router


def _build_router(sizes: tuple[int, int], config: MoEConfig, dictionary: Dictionary) -> Router | HashRouter:
    match config.moe_router:
        case "threshold":
            target = config.moe_target_experts_per_token
            return ThresholdRouter(*sizes, config.moe_threshold, config.experts_per_token_limit, target)
        case "topk":
            return TopKRouter(*sizes, config.k)
        case "expert_choice":
            return ExpertChoiceRouter(*sizes, config.k)
        case "base":
            return BaseRouter(*sizes)
        case "hash":
            return HashRouter(*sizes, hash_table(config, dictionary))
    raise FlagError(f"--moe-router must be one of {', '.join(ROUTERS)}, got {config.moe_router}")


def hash_table(config: MoEConfig, dictionary: Dictionary) -> Tensor:
    match config.moe_hash_table:
        case "random":
            return random_table(len(dictionary), config.moe_num_experts)
        case "balanced":
            return balanced_table(dictionary.count, config.moe_num_experts)
    raise FlagError(f"--moe-hash-table must be one of {', '.join(HASH_TABLES)}, got {config.moe_hash_table}")
