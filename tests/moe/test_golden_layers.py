"""Single layers against the authors' implementation: values, gradients, metrics."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from xmoe_fairseq.moe import BaseRouter, MoELayer, Router, RoutingStats, ThresholdRouter, TopKRouter
from xmoe_fairseq.moe.stats import load_cv

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text())
EXPERT_PARAMETERS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def build(case: dict, arrays: dict[str, torch.Tensor]) -> MoELayer:
    sizes = case["model_dim"], case["num_experts"]
    router: Router = {
        "threshold": lambda: ThresholdRouter(*sizes, threshold=case["threshold"]),
        "topk": lambda: TopKRouter(*sizes, k=case["k"]),
        "base": lambda: BaseRouter(*sizes),
    }[case["router"]]()
    factor = case["capacity_factor"]
    layer = MoELayer(sizes[0], case["expert_dim"], sizes[1], router, factor, factor)
    with torch.no_grad():
        router.weight.copy_(arrays["router_weight"])
        for name in EXPERT_PARAMETERS:
            getattr(layer.experts, name).copy_(arrays[name])
    return layer.train(case.get("train", True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_layer_reproduces_the_authors_numbers(case: dict) -> None:
    arrays = {name: torch.tensor(a) for name, a in np.load(GOLDEN / f"{case['name']}.npz").items()}
    layer = build(case, arrays)
    x = arrays["x"].requires_grad_()
    y, routing = layer(x)
    assert_close(y, arrays["output"], rtol=1e-5, atol=1e-6)
    assert_close(routing.combine_weights(), arrays["combine_weights"], rtol=1e-5, atol=1e-6)
    assert_close(routing.load_balance_loss, arrays["load_balance_loss"], rtol=1e-5, atol=1e-6)
    if "grad_output" in arrays:
        ((y * arrays["grad_output"]).sum() + routing.load_balance_loss).backward()
        gradients = {"x": x.grad, "router_weight": layer.router.weight.grad}
        gradients |= {name: getattr(layer.experts, name).grad for name in EXPERT_PARAMETERS}
        for name, gradient in gradients.items():
            assert_close(
                gradient, arrays[f"grad_{name}"], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("case", [c for c in CASES if "top1_load_cv" in c], ids=lambda case: case["name"])
def test_statistics_reproduce_the_authors_metrics(case: dict) -> None:
    arrays = {name: torch.tensor(a) for name, a in np.load(GOLDEN / f"{case['name']}.npz").items()}
    _, routing = build(case, arrays)(arrays["x"])
    stats = RoutingStats.of(routing)
    first_prob_T, first_T = routing.probs_TE.max(dim=1)
    measured = {
        "experts_per_token_wanted": stats.rows_wanted / stats.tokens,
        "experts_per_token_kept": stats.rows_kept / stats.tokens,
        "top1_drop_percent": 100 * (1 - (routing.rank_R == 0).sum() / stats.tokens),
        "top1_load_cv": load_cv(torch.bincount(first_T, minlength=routing.num_experts)),
        "top1_prob_mean": first_prob_T.mean(),
    }
    for name, value in measured.items():
        assert value.item() == pytest.approx(case[name], rel=1e-5, abs=1e-5), name
