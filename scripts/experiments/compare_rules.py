"""Trained models tested with every rule of the threshold router, and top-k, at the same number of experts.

    python scripts/run.py experiments.compare_rules RUN ... [--experts 1 1.5 2] [--tokens 50000] --out FILE

Perplexity of validation text, the same tokens for all, and in brackets the mass that is kept: the probability
of the experts that a token takes. A layer has the threshold with which its tokens take so many experts on
average, found on these tokens; a token may take all experts, whatever the limit was in training. With one
expert all rules are the same, and top-k has whole numbers. Runs that differ in the seed alone make one row,
the mean. `as it is`: by the router that it was trained with. Writes FILE.md, FILE.json.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.results import publish, read_run
from experiments.runs import Run, alike, rows_of
from xmoe_fairseq.batches import Batches
from xmoe_fairseq.moe import ThresholdRouter, moe_layers, record_routing
from xmoe_fairseq.moe.records import fix_thresholds
from xmoe_fairseq.moe.routers.base import by_preference
from xmoe_fairseq.moe.rules import RULES, Rule
from xmoe_fairseq.tables import markdown
from xmoe_fairseq.thresholds.checkpoint import MAX_TOKENS, open_model
from xmoe_fairseq.thresholds.measure import run as measure_loss
from xmoe_fairseq_compat.errors import FlagError, UserError

TOP_K, AS_IT_IS = "top-k", "as it is"
ROUNDS = 3  # at most, in which thresholds are found: as many as there are layers make them exact
SETTINGS = {
    "moe_router": "threshold", "moe_topk": 0, "moe_threshold": 1.0, "moe_threshold_rule": "mass",
    "moe_target_experts_per_token": 0.0, "moe_layer_thresholds": "", "moe_max_experts_per_token": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Of one model, tested in one way."""

    experts: float  # per token, without shared ones
    bits: float  # per target token
    mass: float  # of a token, that is kept
    thresholds: Sequence[float] = ()  # of each MoE layer

    @property
    def perplexity(self) -> float:
        return float(2**self.bits)


def measure(model: nn.Module, batches: Batches, each: Callable[[int, Any], None] = lambda *_: None) -> Found:
    """
    Args:
        each: gets the number of a layer, and what it routed, of every batch.
    """
    tokens = rows = mass = 0.0
    numbers = {id(layer): number for number, layer in enumerate(moe_layers(model))}
    with record_routing(model) as records:

        def count() -> None:
            nonlocal tokens, rows, mass
            for layer, routing in records:
                tokens, rows = tokens + routing.num_tokens, rows + routing.token_R.numel()
                mass += float(routing.probs_TE[routing.token_R, routing.expert_R].sum())
                each(numbers[id(layer)], routing)
            records.clear()

        bits, _ = measure_loss(model, [], batches, count)
    return Found(rows / tokens, bits, mass / tokens)


def fit(model: nn.Module, batches: Batches, rule: Rule, experts: float) -> list[float]:
    """The layers' thresholds with which tokens take so many on average, their first choice always.

    What a layer reads depends on those below it: in each round one more of them is as it will be.
    """
    thresholds = [rule.threshold((experts - 1) / moe_layers(model)[0].num_experts)] * len(moe_layers(model))
    for _ in range(min(ROUNDS, len(thresholds))):
        levels: list[list[np.ndarray]] = [[] for _ in thresholds]

        def keep(layer: int, routing: Any, levels: list[list[np.ndarray]] = levels) -> None:
            sorted_TE, _ = by_preference(routing.probs_TE, routing.num_experts)
            levels[layer].append(rule.level(rule.value(sorted_TE))[:, 1:].cpu().numpy())

        fix_thresholds(model, thresholds, rule.name)
        measure(model, batches, keep)
        thresholds = [threshold_for(rule, np.concatenate(each), experts - 1) for each in levels]
    return thresholds


def threshold_for(rule: Rule, level_TK: np.ndarray, further: float) -> float:
    """That with which so many of a token's K further choices are taken, on average."""
    wanted = round(further * len(level_TK))
    if not 0 < wanted < level_TK.size:
        return rule.threshold(float(wanted > 0))
    below, above = np.partition(level_TK.ravel(), (wanted - 1, wanted))[wanted - 1 : wanted + 1]
    return float(rule.threshold((float(below) + float(above)) / 2))


def ways(model: nn.Module, batches: Batches, experts: float) -> Iterator[tuple[str, Found]]:
    """Of a model with threshold routers."""
    routers: list[Any] = [layer.router for layer in moe_layers(model)]
    if experts == int(experts):
        for router in routers:
            router.max_experts_per_token = int(experts)
        fix_thresholds(model, [1.0] * len(routers), "mass")
        yield TOP_K, measure(model, batches)
        for router in routers:
            router.max_experts_per_token = 0
    for name, rule in RULES.items() if experts > 1 else ():
        thresholds = fit(model, batches, rule, experts)
        fix_thresholds(model, thresholds, name)
        yield name, Found(**{**asdict(measure(model, batches)), "thresholds": thresholds})


def test(run: Path, wanted: Sequence[float], tokens: int) -> dict[str, dict[str, Found]]:
    """By the number of experts, then by the way to choose them."""
    checkpoint, data = run / "checkpoint_best.pt", Path(read_run(run)["data"])
    model, task, cfg = open_model(checkpoint, data)
    batches = Batches(task, "valid", tokens, cfg.dataset.max_tokens_valid or MAX_TOKENS, seed=1)
    routers = {getattr(cfg.model, "moe_router", "")} if moe_layers(model) else {""}
    if not routers <= {"threshold", "topk"}:
        raise UserError(f"RUN must be of a model with --moe-router threshold or topk, got {run}")
    found = {AS_IT_IS: {AS_IT_IS: measure(model, batches)}}
    model, *_ = open_model(checkpoint, data, **SETTINGS)
    most = moe_layers(model)[0].num_experts
    if wrong := [number for number in wanted if not 1 <= number <= most]:
        raise FlagError(f"--experts must be from 1 to {most}, the experts of {run}, got {wrong[0]:g}")
    assert all(isinstance(layer.router, ThresholdRouter) for layer in moe_layers(model))
    return found | {f"{number:g}": dict(ways(model, batches, number)) for number in wanted}


def table(found: dict[str, list[dict[str, dict[str, Found]]]]) -> str:
    """
    Args:
        found: by row, of each of its runs.
    """
    titles = (TOP_K, *RULES)

    def cell(each: Sequence[dict[str, Found]], way: str) -> str:
        if way not in each[0]:
            return "-"
        perplexity = statistics.mean(one[way].perplexity for one in each)
        return f"{perplexity:.2f} ({statistics.mean(one[way].mass for one in each):.3f})"

    rows = []
    for name, runs in found.items():
        for number in runs[0]:
            each = [run[number] for run in runs]
            if number == AS_IT_IS:
                number = f"{statistics.mean(one[AS_IT_IS].experts for one in each):.2f}"
            rows.append([name, number, *(cell(each, way) for way in (AS_IT_IS, *titles))])
    return markdown(["trained as", "experts/token", AS_IT_IS, *titles], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN")
    add("--experts", type=float, nargs="+", default=[1, 1.3, 1.5, 2, 3, 4], metavar="N",
        help="per token on average, without shared ones (default: 1 1.3 1.5 2 3 4)")  # fmt: skip
    add("--tokens", type=int, default=50_000, help="of validation text (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="FILE", help="to write, without .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(alike([Run(folder, read_run(folder), {}) for folder in args.runs]))
    found = {
        name: [test(run.folder, args.experts, args.tokens) for run in runs] for name, runs in rows.items()
    }
    content = [
        {"run": str(run.folder), "tested": tested}
        for name, runs in rows.items()
        for run, tested in zip(runs, found[name], strict=True)
    ]
    publish(args.out, table(found), content)


if __name__ == "__main__":
    main()
