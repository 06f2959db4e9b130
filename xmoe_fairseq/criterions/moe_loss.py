"""What the moe_ criterions add to fairseq's own: the auxiliary losses, and what to log (`routing_log.py`)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from torch import Tensor, nn

from xmoe_fairseq.criterions.routing_log import SIDES, log_side, routing_sums
from xmoe_fairseq.criterions.sparsity import PENALTIES, log_sparsity, mean_penalty, sums_of, watch
from xmoe_fairseq.moe import Routing, moe_layers, record_routing
from xmoe_fairseq_compat.errors import FlagError, flag


@dataclass
class MoELossConfig(FairseqDataclass):
    moe_loss_coeff: float = field(
        default=0.01,  # Switch Transformer, section 2.2
        metadata={
            "help": "weight of the load-balance loss (topany: of its own), per MoE layer and unit of sample "
            "size; not of --moe-router relu, whose loss has a weight of its own, which is steered"
        },
    )
    moe_z_loss_coeff: float = field(
        default=0.0, metadata={"help": "weight of the router z-loss, per MoE layer and unit of sample size"}
    )
    moe_entropy_coeff: float = field(
        default=0.0,
        metadata={
            "help": "weight of the mean entropy of a token's probabilities, per MoE layer and unit of sample "
            "size: fewer experts then reach a threshold (1e-4 in arXiv 2403.07652)"
        },
    )
    ffn_sparsity_coeff: float = field(
        default=0.0,
        metadata={
            "help": "weight of a penalty on the ReLU activations of a dense model's FFNs, mean over FFNs, "
            "per unit of sample size: before xmoe-convert (docs/dense_to_sparse.md); 0 = off"
        },
    )
    ffn_sparsity: str = field(
        default="hoyer",
        metadata={
            "help": "that penalty, of a token's F activations h: hoyer, (sum h)^2 / (F sum h^2), or l1, the "
            "mean of h (arXiv 2310.04361)"
        },
    )


# The auxiliary losses by their names in a Routing, and the fields above that weigh them.
WEIGHTS = {
    "load_balance_loss": "moe_loss_coeff",
    "z_loss": "moe_z_loss_coeff",
    "entropy_loss": "moe_entropy_coeff",
}


class MoELossMixin:
    """Put before one of fairseq's criterions.

    The loss to minimise is `task_loss + sample_size * sum over MoE layers (coeff * load_balance + z_coeff *
    z_loss + entropy_coeff * entropy)`, with 1 in the place of coeff where a router weighs its own loss; of a
    dense model `task_loss + sample_size * ffn_sparsity_coeff * penalty` (`sparsity.py`). What is logged as
    `loss` stays the task's own, so that it can be compared with a dense model's.
    """

    padding_idx: int  # fairseq's
    of_adaptive_softmax = False
    ffn_sparsity_coeff, ffn_sparsity = MoELossConfig.ffn_sparsity_coeff, MoELossConfig.ffn_sparsity
    loss_weights = {name: getattr(MoELossConfig, coeff) for name, coeff in WEIGHTS.items()}

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> Any:
        built = super().build_criterion(cfg, task).weigh(*(getattr(cfg, coeff) for coeff in WEIGHTS.values()))
        return built.sparsify(cfg.ffn_sparsity_coeff, cfg.ffn_sparsity)

    def weigh(
        self, moe_loss_coeff: float, moe_z_loss_coeff: float = 0.0, moe_entropy_coeff: float = 0.0
    ) -> Any:
        """This criterion, with these weights of the auxiliary losses. Raises FlagError."""
        given = (moe_loss_coeff, moe_z_loss_coeff, moe_entropy_coeff)
        for coeff, value in zip(WEIGHTS.values(), given, strict=True):
            if not 0 <= value < float("inf"):
                raise FlagError(f"{flag(coeff)} must be 0 or more, got {value}")
        self.loss_weights = dict(zip(WEIGHTS, given, strict=True))
        return self

    def sparsify(self, coeff: float, kind: str) -> Any:
        """This criterion, with a penalty on the FFNs' activations. Raises FlagError."""
        if not 0 <= coeff < float("inf"):
            raise FlagError(f"--ffn-sparsity-coeff must be 0 (off) or more, got {coeff}")
        if kind not in PENALTIES:
            raise FlagError(f"--ffn-sparsity must be one of {', '.join(PENALTIES)}, got {kind}")
        self.ffn_sparsity_coeff, self.ffn_sparsity = coeff, kind
        return self

    def watch_ffns(self, model: nn.Module, sample: dict[str, Any]) -> AbstractContextManager[Any]:
        if not self.ffn_sparsity_coeff:
            return nullcontext()
        return watch(self.ffn_sparsity, model, sample["net_input"], self.padding_idx)

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Returns loss, sample size and logging outputs (sums). With reduce=False the loss is per token, and
        the auxiliary losses, which belong to no token, are left out."""
        adaptive = getattr(getattr(model, "decoder", None), "adaptive_softmax", None)
        if adaptive is not None and model.training and not self.of_adaptive_softmax:
            raise FlagError("--adaptive-softmax-cutoff needs --criterion moe_adaptive_loss")
        with record_routing(model) as records, self.watch_ffns(model, sample) as calls:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
        if reduce and records:
            loss = loss + sample_size * self.auxiliary_loss(routing for _, routing in records)
        if self.ffn_sparsity_coeff:
            penalty = mean_penalty(calls, loss.device)
            logging_output.update(sums_of(calls, penalty, sample_size))
            loss = loss + sample_size * self.ffn_sparsity_coeff * penalty if reduce else loss
        # Of the layers that there are, not those that ran: LayerDrop leaves some out, and ranks must log the
        # same keys and shapes for their sums to be reduced together.
        logging_output.update(routing_sums(moe_layers(model), records, loss.device))
        return loss, sample_size, logging_output

    def auxiliary_loss(self, routings: Iterable[Routing]) -> Tensor | float:
        """A loss that does not count is left out: 0 times one that has overflowed would be NaN."""
        terms = []
        for routing in routings:
            weights = dict(self.loss_weights)
            if routing.loss_weight is not None:
                weights["load_balance_loss"] = routing.loss_weight
            terms += [weight * getattr(routing, name) for name, weight in weights.items() if weight]
        return torch.stack(terms).sum() if terms else 0.0

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        super().reduce_metrics(logging_outputs)
        for side in SIDES:
            log_side(side, logging_outputs)
        log_sparsity(logging_outputs)
