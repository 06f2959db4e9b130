"""What every layer whose tokens go to experts does: it takes padding out, and puts 0 in its place."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from xmoe_fairseq.moe import finite
from xmoe_fairseq.moe.routing import Routing
from xmoe_fairseq.moe.stats import RoutingStats, RowCounts, ffn_flops, ffn_parameters


class RoutedLayer(nn.Module):
    """Padding takes no part: not in routing, capacity, losses or statistics, and its output is 0.

    Args:
        router_flops: of the router, for a token. The others are those of `MoELayer`.
    """

    num_cheap = 0  # experts that compute nothing, beside the E; see cheap.py
    finite: Tensor | None = None  # sum of its routings' since `check_finite` has read it

    def __init__(
        self, model_dim: int, expert_dim: int, num_experts: int, router_flops: int, dense_ffn_dim: int | None,
        name: str, side: str,
    ) -> None:  # fmt: skip
        super().__init__()
        if dense_ffn_dim is not None and dense_ffn_dim < 1:
            raise ValueError(f"dense_ffn_dim must be at least 1, or None, got {dense_ffn_dim}")
        self.model_dim, self.expert_dim, self.num_experts = model_dim, expert_dim, num_experts
        self.router_flops = router_flops
        self.dense_ffn_dim = dense_ffn_dim or expert_dim
        self.name, self.side = name, side

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """
        Args:
            x: (..., D) tokens.
            padding_mask: (...) bool, True = padding; None = no padding.
            token_ids: (...) for a router that goes by them, or by the numbers of their sentences; others pass
                them over.

        Returns:
            y of x's shape and dtype, and the Routing of the non-padding tokens in row-major order.

        Raises:
            ValueError: shapes or mask type do not fit.
            FloatingPointError: a non-padding token holds NaN or inf. On a GPU `check_finite` says so.
        """
        if x.shape[-1:] != (self.model_dim,):
            raise ValueError(f"x must be of shape (..., {self.model_dim}), got {tuple(x.shape)}")
        if token_ids is not None and token_ids.shape != x.shape[:-1]:
            rule = f"must be of shape {tuple(x.shape[:-1])}"
            raise ValueError(f"token_ids {rule}, got {tuple(token_ids.shape)}")
        x_ND = x.reshape(-1, self.model_dim)
        ids_N = None if token_ids is None else token_ids.reshape(-1)
        if padding_mask is None:
            y_ND, routing = self._of_tokens(x_ND, ids_N)
            return y_ND.to(x.dtype).view(x.shape), routing
        if padding_mask.shape != x.shape[:-1] or padding_mask.dtype.is_floating_point:
            got = f"{padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
            raise ValueError(f"padding_mask must be bool of shape {tuple(x.shape[:-1])}, got {got}")
        real_T = real_tokens(padding_mask)
        ids_T = None if ids_N is None else ids_N.index_select(0, real_T)
        y_TD, routing = self._of_tokens(x_ND.index_select(0, real_T), ids_T)
        return torch.zeros_like(x_ND).index_copy(0, real_T, y_TD.to(x.dtype)).view(x.shape), routing

    def _of_tokens(self, x_TD: Tensor, ids_T: Tensor | None) -> tuple[Tensor, Routing]:
        try:
            y_TD, routing = self.forward_tokens(x_TD, ids_T)
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}: {error}") from None
        if routing.finite is not None:
            self.finite = routing.finite if self.finite is None else self.finite + routing.finite
        return y_TD, routing

    def forward_tokens(self, x_TD: Tensor, ids_T: Tensor | None) -> tuple[Tensor, Routing]:
        """Of tokens that are no padding."""
        raise NotImplementedError

    def retain_dropout(self) -> None:
        """Keep the experts' dropout in evaluation, for estimates of a model's uncertainty."""
        for module in self.modules():
            if "dropout_in_evaluation" in vars(module):
                vars(module)["dropout_in_evaluation"] = True

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Of the experts held here."""
        raise NotImplementedError

    @property
    def expert_size(self) -> int:
        """Parameters of one expert."""
        return ffn_parameters(self.model_dim, self.expert_dim)

    def flops(self, stats: RoutingStats | RowCounts) -> dict[str, Any]:
        """Of calls with these statistics: of what was routed, with all experts, and of the dense FFN.

        The router is included. The authors count the experts only; the router is what the saving costs.
        """
        tokens: Any = stats.tokens
        router, all_rows = tokens * self.router_flops, tokens * self.num_experts + stats.rows_shared
        return {
            "flops": router + ffn_flops(self.rows_computed(stats), self.model_dim, self.expert_dim),
            "flops_all_experts": router + ffn_flops(all_rows, self.model_dim, self.expert_dim),
            "flops_dense_ffn": ffn_flops(tokens, self.model_dim, self.dense_ffn_dim),
        }

    def rows_computed(self, stats: RoutingStats | RowCounts) -> Any:
        """Rows that the experts computed in a call with these statistics."""
        return stats.rows_computed

    def to_log(self) -> dict[str, Tensor | float]:
        """What is worth a record beside the statistics of the routing, such as the router's threshold."""
        return {}


_real = WeakTensorKeyDictionary()  # of masks in use: what they were when they were read, and what was found


def real_tokens(padding_mask: Tensor) -> Tensor:
    """(T,) places of the tokens that are no padding, in row-major order.

    A GPU's host waits for their number. A model gives one mask to all its layers, of which the first waits.
    On a CPU each looks: there other libraries may write into a tensor, which its version does not tell.
    """
    if finite.can_read(padding_mask):
        return _look_for_tokens(padding_mask)
    mask = padding_mask if padding_mask._base is None else padding_mask._base
    # Tensors of the inference mode have no version, and are of no use outside.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or mask.is_inference():
        return _look_for_tokens(padding_mask)
    as_read = (mask._version, padding_mask.shape, padding_mask.stride(), padding_mask.storage_offset())
    if _real.get(mask, (None,))[0] != as_read:
        _real[mask] = as_read, _look_for_tokens(padding_mask)
    real_T: Tensor = _real[mask][1]
    return real_T


def _look_for_tokens(padding_mask: Tensor) -> Tensor:
    return (~padding_mask.bool()).reshape(-1).nonzero().squeeze(1)
