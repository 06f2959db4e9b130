"""Which neurons of an FFN are shared, and which of the others become one expert: E groups of equal size."""

from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import eigsh
from torch import Tensor

from xmoe_fairseq.convert.ffn import FeedForward

GROUPINGS = ("coactivation", "clustering", "random")
Matrix = np.ndarray[Any, np.dtype[np.float64]]
# A choice. Of which pairs of neurons are looked at: that costs F/D as much as the FFN itself.
PAIR_TOKENS = 50_000
ROUNDS = 8  # of balanced k-means at most: a choice, it has mostly settled by then


class CoActivation:
    """How often, and how strongly, two neurons of one FFN matter for the same token.

    A neuron matters by the length of what it adds to the output, a_i = |h_i| * |column i of fc2|. Kept are
    the running sums of a_i * a_j, (F, F), of the first PAIR_TOKENS, of h_i, and of the tokens for which
    neuron i is active: memory does not grow with the tokens.

    Args:
        pairs: whether to look at pairs.
        shared: the share of neurons that is to be found; so many are active for a token, those that matter
            most for it: a choice.
    """

    def __init__(self, ffn: FeedForward, pairs: bool, shared: float = 0.0) -> None:
        self.scale_F = ffn.fc2_weight.norm(dim=0)
        width = self.scale_F.numel()
        self.pairs_FF = torch.zeros(width, width) if pairs else None
        self.num_shared, self.active_F = round(shared * width), torch.zeros(width, dtype=torch.long)
        self.hidden_F = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def add(self, hidden_TF: Tensor) -> None:
        matters_TF = hidden_TF.abs() * self.scale_F
        if self.pairs_FF is not None and self.tokens < PAIR_TOKENS:
            self.pairs_FF.addmm_(matters_TF.t(), matters_TF)
        active_N = matters_TF.topk(self.num_shared).indices.flatten()
        self.active_F += torch.bincount(active_N, minlength=self.active_F.numel())
        self.tokens += hidden_TF.size(0)
        self.hidden_F += hidden_TF.sum(dim=0)

    def is_finite(self) -> bool:
        sums = [self.hidden_F] if self.pairs_FF is None else [self.hidden_F, self.pairs_FF]
        return all(bool(torch.isfinite(sum_).all()) for sum_ in sums) and self.scale_F.isfinite().all().item()

    def mean_hidden(self) -> Tensor:
        return (self.hidden_F / max(self.tokens, 1)).float()

    def shared_and_others(self) -> tuple[Tensor, Tensor]:
        """The most often active neurons, and the rest. Pei et al. 2025 (CMoE), arXiv 2502.04416; there a few
        of largest |h_i| are active."""
        order_F = self.active_F.argsort(descending=True, stable=True)
        return order_F[: self.num_shared], order_F[self.num_shared :]

    def cosine(self) -> Matrix:
        """(F, F) in [0, 1]; a neuron that never mattered is like no other."""
        assert self.pairs_FF is not None
        length_F = self.pairs_FF.diagonal().sqrt().clamp(min=1e-12)
        return (self.pairs_FF / length_F / length_F.unsqueeze(1)).double().numpy()


def group(
    method: str, ffn: FeedForward, seen: CoActivation, num_groups: int, seed: int, neurons_N: Tensor
) -> Tensor:
    """(E, N/E) neurons of each expert, each of these N once.

    `clustering`: neurons whose rows of fc1 point the same way. `coactivation`: neurons that matter for the
    same tokens. `random`: what the others must beat.
    """
    neurons_N = neurons_N.sort().values
    if method == "random":
        order_N = torch.randperm(neurons_N.numel(), generator=torch.Generator().manual_seed(seed))
        return neurons_N[order_N].view(num_groups, -1)
    if method == "clustering":
        rows = torch.cat([ffn.fc1_weight, ffn.fc1_bias.unsqueeze(1)], dim=1)
        points = torch.nn.functional.normalize(rows[neurons_N]).double().numpy()
    else:
        chosen_FF = np.ix_(neurons_N.numpy(), neurons_N.numpy())
        points = spectral_points(seen.cosine()[chosen_FF], num_groups, seed)
    return neurons_N[balanced_clusters(points, num_groups, seed)]


def spectral_points(affinity_FF: Matrix, count: int, seed: int) -> Matrix:
    """A neuron as a point, near to those it is like (Ng, Jordan and Weiss 2001)."""
    np.fill_diagonal(affinity_FF, 1.0)  # also of a neuron that never mattered
    degree_F = np.sqrt(affinity_FF.sum(axis=0))
    normal_FF = affinity_FF / degree_F / degree_F[:, None]
    start_F = np.random.default_rng(seed).random(len(affinity_FF))
    if count >= len(affinity_FF) - 1:  # eigsh finds fewer than all
        points = np.linalg.eigh(normal_FF)[1][:, -count:]
    else:
        points = eigsh(normal_FF, k=count, v0=start_F)[1]
    return points / np.linalg.norm(points, axis=1, keepdims=True).clip(min=1e-12)


def balanced_clusters(points: Matrix, count: int, seed: int) -> Tensor:
    """k-means with equal clusters: each round assigns points at the least total cost (exact, by scipy)."""
    size = len(points) // count
    centres, _ = kmeans2(points, count, minit="++", seed=seed)
    owner = np.full(len(points), -1)
    for _ in range(ROUNDS):
        squares = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
        cost = (squares - 2 * points @ centres.T).clip(min=0)
        place = linear_sum_assignment(np.repeat(cost, size, axis=1))[1]  # column c is cluster c // size
        if (place // size == owner).all():
            break
        owner = place // size
        centres = np.stack([points[owner == cluster].mean(axis=0) for cluster in range(count)])
    return torch.from_numpy(np.argsort(owner, kind="stable")).view(count, size)
