"""What xmoe_fairseq_compat, which knows no MoE, is told of it. Imported with the models."""

from collections.abc import Mapping
from typing import Any

from xmoe_fairseq.cost import meter_of
from xmoe_fairseq.criterions.routing_log import SHOWN, SIDES
from xmoe_fairseq.moe.experts.kernels import AUTO
from xmoe_fairseq.moe.records import check_finite
from xmoe_fairseq.moe.routers.registry import RouterKind, flags_of_routers, registered_routers
from xmoe_fairseq.moe.routers.threshold_flags import DEFAULT_BUDGET, FIXED_RULE
from xmoe_fairseq.parallel.shards import join_shards
from xmoe_fairseq.saved_settings import brought_up
from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.override_rules import refuse
from xmoe_fairseq_compat.settings import as_dict


def read_whole(state: dict[str, Any], path: Any, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """A checkpoint with all its experts, whichever files they lie in.

    Its configuration then says so: fairseq builds the model as the training run had it, and here every
    process that only reads holds all experts, and computes them by whatever kernel suits it.

    Args:
        overrides: None where no model is built of it, as for an average.

    Raises:
        CheckpointError: a file of experts is missing or damaged; or the model's router is not registered.
    """
    cfg: Any = state.get("cfg") or {}
    model_cfg = cfg.get("model")
    if hasattr(model_cfg, "keys") and "moe_expert_parallel_size" in model_cfg:
        model_cfg["moe_expert_parallel_size"] = 1
        asked = getattr(overrides, "asked", overrides) or {}
        asked = {**asked, **(asked.get("model") or {})}
        model_cfg.update({"moe_kernel": asked.get("moe_kernel", AUTO), **brought_up(as_dict(model_cfg))})
        if "moe_router" in asked:
            model_cfg.update(left_by_another(asked))
        router, user_dir = model_cfg.get("moe_router"), (cfg.get("common") or {}).get("user_dir")
        is_own = overrides is not None and "moe_router" not in asked
        if is_own and str(router) not in {"None", *registered_routers()}:
            missing = f"its router {router} is not registered; add the --user-dir that registers it"
            raise CheckpointError(path, missing + (f", in training {user_dir}" if user_dir else ""))
    return join_shards(state, path)


def left_by_another(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that the router which is asked for does not take, at their defaults: they were another's."""
    taken = registered_routers().get(asked["moe_router"], RouterKind).flags
    return {f.name: f.default for f in flags_of_routers() if f not in taken and f.name not in asked}


def check_overrides(overrides: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """What must hold between settings of MoE layers.

    Args:
        settings: the model's, as overridden.
    """
    for name, value in overrides.items():
        if name.startswith("moe_") and value is None:  # which would be the flag's default
            refuse(f"{name} must have a value, got None")
    target = "moe_target_experts_per_token"
    if overrides.get(target):
        must = f"{target} must be 0 (to use moe_threshold): a trained model is steered no more"
        refuse(f"{must}, got {overrides[target]}")
    if overrides.get("moe_topk") and settings.get("moe_router") == "relu":
        refuse(f"moe_topk counts for nothing in a trained relu model, got {overrides['moe_topk']}")
    one, layers, rule = "moe_threshold", "moe_layer_thresholds", "moe_threshold_rule"
    for other, off, kind in ((target, 0, "trained with a budget"), (layers, "", "with a t for each layer")):
        if one in overrides and settings.get(other) not in (None, 0, "", DEFAULT_BUDGET):
            nothing = f"{one} counts for nothing in a model {kind}"
            as_before = f"its rule is {settings.get(rule) or FIXED_RULE}"
            refuse(f"{nothing}; add '{other}': {off!r}; {as_before}, got {overrides[one]}")
    if rule in overrides and not overrides.keys() & {one, layers, "moe_router"}:
        refuse(f"{rule} must come with its own {one} or {layers}, got {overrides[rule]} alone")
    taken = {f.name for f in registered_routers().get(settings.get("moe_router", ""), RouterKind).flags}
    fixed = settings.get(one) is not None or settings.get(layers) or settings.get(target) != DEFAULT_BUDGET
    if "moe_router" in overrides and one in taken and not fixed:
        must = f"must come with its own {one} or {layers}: a trained model is steered no more"
        refuse(f"moe_router {must}, got {overrides['moe_router']} alone")


plugins.after_load.append(read_whole)
plugins.override_rules.append(check_overrides)
plugins.shaping.append(
    "no_moe_.*|moe_(freq|(num|shared|zero|copy|constant)_experts|ffn_split|router|router_(args|hidden_dim)|combine"
    "|balance|target_.*)"
)
plugins.meters.append(meter_of)
plugins.checks.append(check_finite)
plugins.unshown.append(f"moe_(?!({'|'.join(SIDES)})_({'|'.join(SHOWN)})$).*")
plugins.brief = True
