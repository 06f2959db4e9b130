"""Auxiliary losses of a router."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe_fairseq.moe.routing import count


def load_balance_loss(probs_TE: Tensor, first_choice_T: Tensor) -> Tensor:
    """Switch Transformer's load-balance loss: `E * sum_e mean_t(p[t, e]) * mean_t(first[t] == e)`.

    Only the first choice is balanced; further choices stay free. 1 when the load is uniform, E when
    one expert takes everything, 0 without tokens. Fedus et al. 2021, eq. 4, arXiv 2101.03961.
    """
    num_tokens, num_experts = probs_TE.shape
    return share_loss(probs_TE, count(first_choice_T, num_experts).to(probs_TE.dtype) / max(num_tokens, 1))


def share_loss(probs_TE: Tensor, share_E: Tensor) -> Tensor:
    """`E * sum_e share[e] * mean_t(p[t, e])`, of the experts' shares of some choices; 0 without tokens."""
    num_tokens, num_experts = probs_TE.shape
    if num_tokens == 0:
        return probs_TE.sum()  # 0, and still part of the graph
    # The sum's gradient is a view; the mean's would be written out, as large as the probabilities.
    return torch.dot(probs_TE.sum(dim=0), share_E.to(probs_TE.dtype) * (num_experts / num_tokens))


def weigh_cheap(probs_TE: Tensor, num_cheap: int, weight: float) -> Tensor:
    """What `share_loss` is to see in the place of p: the last experts' shares then count `weight` times in
    `E * sum_e eta_e f_e P_e` (Jin et al. 2024, MoE++, section 3.3, arXiv 2410.07348)."""
    if not num_cheap or weight == 1:
        return probs_TE
    others_TE, cheap_TZ = probs_TE.tensor_split([probs_TE.size(1) - num_cheap], dim=1)
    return torch.cat([others_TE, cheap_TZ * weight], dim=1)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-partition of the router, which keeps its logits small.

    Zoph et al. 2022 (ST-MoE), eq. 5, arXiv 2202.08906. 0 without tokens.
    """
    if logits_TE.size(0) == 0:
        return logits_TE.sum()
    return F.mse_loss(torch.logsumexp(logits_TE, dim=-1), logits_TE.new_zeros(logits_TE.size(0)))


def square_hoyer(hidden_TF: Tensor) -> Tensor:
    """(...,) of (..., F): `(sum_f |h_f|)^2 / (F sum_f h_f^2)`, a smooth share of the neurons that matter.

    1 if all are alike, 1 / F if one is alone, 0 if there is none. Its gradient makes the small ones smaller
    and the large ones larger. Yang et al. 2020 (DeepHoyer), arXiv 1908.09979, there without F.
    """
    # In fp32 at least: in half precision the squares of a wide layer overflow.
    dtype = torch.promote_types(hidden_TF.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(hidden_TF, dim=-1, dtype=dtype)
    most = (length.square() * hidden_TF.size(-1)).clamp(min=torch.finfo(dtype).tiny)
    return hidden_TF.abs().sum(dim=-1, dtype=dtype).square() / most


def mean_magnitude(hidden_TF: Tensor) -> Tensor:
    """(...,) of (..., F): L1 over F."""
    return hidden_TF.abs().mean(dim=-1, dtype=torch.promote_types(hidden_TF.dtype, torch.float32))
