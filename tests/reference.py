"""The slow oracle: one token, one expert at a time, from the paper's text. Never optimised."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xmoe_fairseq.moe import (
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    HashRouter,
    MoELayer,
    ReLURouter,
    Router,
    SeqTopKRouter,
    ThresholdRouter,
    TopAnyRouter,
    TopKRouter,
)
from xmoe_fairseq.moe.balance import AllChoices, GlobalShare


@dataclass
class Expected:
    y_TD: Tensor
    weights_TE: Tensor  # combine weights, 0 where not chosen or dropped
    load_balance_loss: Tensor
    wanted: int
    margin: float  # distance to the closest decision that rounding could flip


def reference_layer(layer: MoELayer, x_TD: Tensor, ids_T: Tensor | None = None) -> Expected:
    """What `layer` must compute for non-padding tokens; differentiable with respect to x and parameters."""
    router, num_tokens, num_experts = layer.router, x_TD.size(0), layer.num_experts  # the cheap apart
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    if isinstance(router, HashRouter):
        choices, margin = [[int(router.table_V[i])] for i in ids_T], math.inf
        probs = [torch.eye(num_experts, dtype=dtype)[e] for (e,) in choices]
    else:
        scores = [router.weight.to(dtype) @ x_TD[t].to(dtype) for t in range(num_tokens)]
        probs = [torch.softmax(z, dim=0) for z in scores]
        bias = getattr(router.balancing, "bias_E", torch.zeros(router.num_experts))  # where a token chooses
        ranked = [torch.softmax(z + bias, dim=0) for z in scores]
        if isinstance(router, ReLURouter):  # its "probabilities" are the scores themselves
            probs = scores
            choices = [[e for e in range(num_experts) if z[e] > 0] for z in scores]
            margin = min([math.inf, *(abs(z_e) for z in scores for z_e in z.tolist())])
        elif isinstance(router, ExpertThresholdRouter) and not of_batch(router):
            choices, margin = above_thresholds(router, [z.tolist() for z in scores])
        elif isinstance(router, TopAnyRouter):
            found = [choose_any(router, x_TD[t].to(dtype)) for t in range(num_tokens)]
            choices, probs = [c for c, _, _ in found], [w for _, w, _ in found]
            margin = min([math.inf, *(m for _, _, m in found)])
        elif isinstance(router, ExpertChoiceRouter):
            own = scores if isinstance(router, ExpertThresholdRouter) else probs
            choices, margin = chosen_by_experts(router, [p.tolist() for p in own])
        elif isinstance(router, SeqTopKRouter):
            choices, margin = shared_choices(router, [p.tolist() for p in ranked], ids_T.tolist())
        else:
            chosen = [choose(layer, p.tolist()) for p in ranked]
            choices, margin = [c for c, _ in chosen], min([math.inf, *(m for _, m in chosen)])
    kept = keep(layer, choices, [p.tolist() for p in probs], num_experts)
    weigh = [torch.sigmoid(z) for z in scores] if isinstance(router, ExpertThresholdRouter) else probs
    y, weights = [], []
    for t in range(num_tokens):
        y_t, weights_t = 0 * x_TD[t].to(dtype), torch.zeros(num_experts, dtype=dtype)
        if layer.output_bias is not None:  # combine = ones
            y_t = y_t + layer.output_bias.to(dtype)
        if layer.shared is not None:
            fc1, fc2 = layer.shared.fc1, layer.shared.fc2
            hidden = layer.experts.activation(fc1.weight @ x_TD[t] + fc1.bias)
            y_t = y_t + fc2.weight @ hidden + fc2.bias
        for e in choices[t]:
            if e >= num_experts:
                y_t = y_t + weigh[t][e] * cheap_expert(layer, e - num_experts, x_TD[t].to(dtype))
            elif (t, e) in kept:
                weight = weigh[t][e]
                if layer.combine == "normalized":  # over all chosen ones, also those beyond a capacity
                    weight = weight / sum(weigh[t][chosen] for chosen in choices[t])
                if layer.output_bias is not None:
                    weight = 1 + weight - weight.detach()
                weight = weight * layer.output_scale
                y_t = y_t + weight * feed_forward(layer, e, x_TD[t])
                weights_t = weights_t + weight * torch.eye(num_experts, dtype=dtype)[e]
        y.append(y_t)
        weights.append(weights_t)
    return Expected(
        y_TD=torch.stack(y) if y else x_TD,
        weights_TE=torch.stack(weights) if y else x_TD.new_zeros(0, num_experts),
        load_balance_loss=auxiliary_loss(router, probs, choices),
        wanted=sum(e < num_experts for chosen in choices for e in chosen),
        margin=margin,
    )


def choose(layer: MoELayer, p: list[float]) -> tuple[list[int], float]:
    """A token's experts in order of preference, and how close the closest call was."""
    order = sorted(range(len(p)), key=lambda e: (-p[e], e))
    router = layer.router
    if isinstance(router, TopKRouter):
        gaps = [p[a] - p[b] for a, b in zip(order, order[1:], strict=False)]
        return order[: router.k], min([math.inf, *(gap for gap in gaps if gap > 0)])
    assert isinstance(router, ThresholdRouter)
    if router.rule.name != "mass":
        least = router.threshold
        if router.rule.name == "relative":
            least = (1 - router.threshold) * p[order[0]]
        chosen = [e for e in order if e == order[0] or p[e] >= least]
        margin = min([math.inf, *(abs(p[e] - least) for e in order[1:])]) if least > 0 else math.inf
        return chosen[: router.max_experts_per_token or None], margin
    chosen, mass, margin = [order[0]], p[order[0]], math.inf
    for e in order[1:]:
        margin = min(margin, abs(mass - router.threshold)) if router.threshold < 1 else margin
        if mass >= router.threshold and router.threshold < 1:
            break
        chosen.append(e)
        mass += p[e]
    return chosen[: router.max_experts_per_token or None], margin


def choose_any(router: TopAnyRouter, x_D: Tensor) -> tuple[list[int], Tensor, float]:
    """DynMoE: a token's experts, their weights (E,), and how close the closest call was."""
    cosine = [w_D @ x_D / (w_D.norm() * x_D.norm()) for w_D in router.weight.to(x_D.dtype)]
    active = router.pool.active_E.tolist()
    score = [torch.sigmoid(c / router.temperature) * a for c, a in zip(cosine, active, strict=True)]
    passed = [
        p - torch.sigmoid(g / router.temperature) for p, g in zip(score, router.threshold_E, strict=True)
    ]
    order = sorted(
        [e for e, a in enumerate(active) if a], key=lambda e: (passed[e].item() <= 0, -score[e].item(), e)
    )
    chosen = [e for e in order if passed[e] > 0] or order[:1]
    chosen = chosen[: router.max_experts_per_token or None]
    weight_E = torch.stack([(1 + (m - m.detach())) / len(chosen) for m in passed])
    gaps = [(score[a] - score[b]).item() for a, b in zip(order, order[1:], strict=False)]
    return chosen, weight_E, min([abs(m) for m in torch.stack(passed).tolist()] + [abs(gap) for gap in gaps])


def chosen_by_experts(router: ExpertChoiceRouter, p: list[list[float]]) -> tuple[list[list[int]], float]:
    """Each token's experts when every expert takes its best tokens, and how close the closest call was."""
    takes = math.ceil(len(p) * router.experts_per_token / router.num_experts)
    choices: list[list[int]] = [[] for _ in p]
    margin = math.inf
    for e in range(router.num_experts):
        order = sorted(range(len(p)), key=lambda t: (-p[t][e], t))
        for t in order[:takes]:
            choices[t].append(e)
        if takes < len(p):
            margin = min(margin, p[order[takes - 1]][e] - p[order[takes]][e])
    return choices, margin


def shared_choices(
    router: SeqTopKRouter, p: list[list[float]], sentences: list[int]
) -> tuple[list[list[int]], float]:
    """Each token's experts when a sentence's tokens share k each, and how close the closest call was."""
    choices: list[list[int]] = [[] for _ in p]
    margin = math.inf
    for sentence in set(sentences):
        tokens = [t for t, number in enumerate(sentences) if number == sentence]
        pairs = sorted((-p[t][e], t, e) for t in tokens for e in range(router.num_experts))
        for _, t, e in pairs[: len(tokens) * router.k]:
            choices[t].append(e)
        gaps = [b - a for (a, *_), (b, *_) in zip(pairs, pairs[1:], strict=False)]
        margin = min([margin, *(gap for gap in gaps if gap > 0)])
    return choices, margin


def of_batch(router: ExpertThresholdRouter) -> bool:
    return router.training and int(router.thresholds.updates) < router.expert_choice_updates


def above_thresholds(router: ExpertThresholdRouter, z: list[list[float]]) -> tuple[list[list[int]], float]:
    """Each token's experts whose thresholds its scores reach, and how close the closest call was."""
    least = router.thresholds.threshold_E.tolist()
    choices = [[e for e, (score, c) in enumerate(zip(z_t, least, strict=True)) if score >= c] for z_t in z]
    return choices, min([math.inf, *(abs(s - c) for z_t in z for s, c in zip(z_t, least, strict=True))])


def keep(
    layer: MoELayer, choices: list[list[int]], p: list[list[float]], num_experts: int
) -> set[tuple[int, int]]:
    """The (token, expert) pairs that capacity leaves: by rank of choice, then probability, then position."""
    factor = layer.capacity_factor if layer.training else layer.eval_capacity_factor
    pairs = {(t, e) for t, chosen in enumerate(choices) for e in chosen}
    if factor == 0:
        return pairs
    capacity = max(layer.min_capacity, math.ceil(len(choices) / num_experts * factor))
    kept = set()
    for e in range(num_experts):
        candidates = [t for t, chosen in enumerate(choices) if e in chosen]
        has_order = not isinstance(layer.router, ReLURouter)
        ranked = sorted((choices[t].index(e) * has_order, -p[t][e], t) for t in candidates)
        kept |= {(t, e) for _, _, t in ranked[:capacity]}
    return kept


def feed_forward(layer: MoELayer, e: int, x_D: Tensor) -> Tensor:
    w1, b1, w2, b2 = (stack[e] for stack in layer.experts.stacked())
    return w2 @ layer.experts.activation(w1 @ x_D + b1) + b2


def cheap_expert(layer: MoELayer, z: int, x_D: Tensor) -> Tensor:
    """MoE++: zero ones first, then those that copy, then constant ones."""
    zero, copy, _ = layer.cheap.numbers
    if z < zero + copy:
        return x_D * (z >= zero)
    c = z - zero - copy
    mix = torch.softmax(layer.cheap.mix.weight[2 * c : 2 * c + 2].to(x_D.dtype) @ x_D, dim=0)
    return mix[0] * x_D + mix[1] * layer.cheap.vector_CD[c].to(x_D.dtype)


def auxiliary_loss(router: Router, probs: list[Tensor], choices: list[list[int]]) -> Tensor:
    if isinstance(router, HashRouter | ExpertChoiceRouter):
        return torch.zeros(())
    if isinstance(router, TopAnyRouter):  # DynMoE, eq. 7
        used = [w_D for w_D, active in zip(router.weight, router.pool.active_E, strict=True) if active]
        length = [w_D.norm() for w_D in used]
        same = [[w @ v / (a * b) for v, b in zip(used, length, strict=True)]
                for w, a in zip(used, length, strict=True)]  # fmt: skip
        off = [c**2 for i, row in enumerate(same) for j, c in enumerate(row) if i != j]
        return (torch.sqrt(torch.stack(off).sum()) if off else 0.0) + sum(length) / len(length)
    if isinstance(router, ReLURouter):
        loss = sum([z.sum() * 0 for z in probs], torch.zeros(()))  # part of the graph, whoever is chosen
        for t, chosen in enumerate(choices):
            for e in chosen:  # ReMoE, eq. 10: E / (k T) x tokens of e, and the mean over tokens
                tokens = sum(e in others for others in choices)
                share = router.num_experts * tokens / (router.sparsity.target * len(choices))
                loss = loss + float(router.sparsity.l1_coeff) * share * probs[t][e] / len(choices)
        return loss
    return load_balance(probs, shares_to_balance(router, choices, probs), router.num_experts)


def shares_to_balance(router: Router, choices: list[list[int]], probs: list[Tensor]) -> list[float]:
    """Of each expert: what of the choices is its own, by those that --moe-balance looks at; 0 = no loss."""
    times = [1.0] * (router.num_experts - router.num_cheap) + [router.cheap_balance] * router.num_cheap
    if isinstance(router.balancing, GlobalShare):  # of the last update
        return [share * n for share, n in zip(router.balancing.share_E.tolist(), times, strict=True)]
    counted = [int(p.argmax()) for p in probs]  # also of a token without choices
    if isinstance(router.balancing, AllChoices):
        counted = [e for chosen in choices for e in chosen]
    is_loss = router.balancing is None or isinstance(router.balancing, AllChoices)
    return [counted.count(e) / max(len(counted), 1) * is_loss * n for e, n in enumerate(times)]


def load_balance(probs: list[Tensor], share: list[float], num_experts: int) -> Tensor:
    """Switch Transformer, eq. 4."""
    loss = torch.zeros(())
    for e in range(num_experts):
        if probs:
            loss = loss + sum(p[e] for p in probs) / len(probs) * share[e]
    return num_experts * loss
