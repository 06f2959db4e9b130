"""fairseq's trainer for models with MoE layers: what it alone knows, it tells them and the user."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.trainer import Trainer
from torch import Tensor, nn

from xmoe_fairseq.activated import describe_model, planned_experts
from xmoe_fairseq.config import MoEConfig, read_field, router_kind
from xmoe_fairseq.criterions.moe_loss import MoELossMixin
from xmoe_fairseq.failure import explain, introduce
from xmoe_fairseq.load import LoadReport
from xmoe_fairseq.moe import check_finite, step_balance
from xmoe_fairseq.moe.records import finite_so_far
from xmoe_fairseq.moe.routers.registry import RouterKind
from xmoe_fairseq.saved_settings import check_saved_settings, settle
from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.settings import as_dict

logger = logging.getLogger(__name__)

DDP_BACKENDS = ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d")
BALANCED = ("moe_cross_entropy", "moe_label_smoothed_cross_entropy")  # or moe_adaptive_loss


class MoETrainer(Trainer):
    """Steers thresholds and balances, and says where and on which rank a run failed."""

    def __init__(self, cfg: Any, task: Any, model: nn.Module, criterion: Any, quantizer: Any = None) -> None:
        backend = str(cfg.distributed_training.ddp_backend)
        if backend not in DDP_BACKENDS:  # nobody has tried the others with experts
            use = "use legacy_ddp or pytorch_ddp"
            raise FlagError(f"--ddp-backend {backend} cannot be combined with MoE layers: {use}")
        combine, planned = read_field(cfg.model, "moe_combine", "probs"), planned_experts(cfg.model)
        if combine == "normalized" and planned and planned[1] <= 1:
            why = "a single one weighs 1, which teaches the router nothing"
            raise FlagError(f"--moe-combine normalized needs more than one expert per token: {why}")
        self.given_model_cfg = dict(as_dict(cfg.model))
        by_default = settle(cfg.model)
        super().__init__(cfg, task, model, criterion, quantizer)
        if dist.is_initialized():
            introduce()
        self.router_kind = router_kind(read_field(cfg.model, "moe_router", MoEConfig.moe_router))
        self._check_criterion(cfg, criterion)
        self._load_report = LoadReport(cfg, model)
        self._valid_subset = ""
        if self.is_data_parallel_master:
            logger.info(describe_model(model, cfg.model) + by_default)
            self._report_validations(task)

    def _check_criterion(self, cfg: Any, criterion: Any) -> None:
        """Whether the loss that the routers need is trained."""
        name = read_field(cfg.criterion, "_name", type(criterion).__name__)
        use = " or ".join([f"moe_{name}"] if f"moe_{name}" in CRITERION_REGISTRY else BALANCED)
        is_moe = isinstance(criterion, MoELossMixin)
        if self.router_kind.weighs_own_loss:
            router = f"--moe-router {read_field(cfg.model, 'moe_router', MoEConfig.moe_router)}"
            if not is_moe:
                raise FlagError(
                    f"{router} cannot be trained without its loss: use {use}, got --criterion {name}"
                )
            given = criterion.loss_weights["load_balance_loss"]
            if given != MoELossMixin.loss_weights["load_balance_loss"]:
                rule = f"must be left out with {router}, which steers its own"
                raise FlagError(f"--moe-loss-coeff {rule}, got {given}")
        needs_loss = read_field(cfg.model, "moe_balance", MoEConfig.moe_balance) not in ("bias", "none")
        if needs_loss and self.router_kind.needs_balance_loss and not is_moe:
            logger.warning(
                f"--criterion {name} leaves out the load-balance loss, so tokens may crowd onto few experts;"
                f" use {use}"
            )

    def _report_validations(self, task: Any) -> None:
        """fairseq lets a task, and nobody else, see what a validation has logged."""
        plain = getattr(task, "post_validate", lambda *_: None)

        def post_validate(model: nn.Module, stats: Any, meters: Any) -> None:
            plain(model, stats, meters)
            self._load_report.after_validation(self._valid_subset, meters, self.get_num_updates())

        task.post_validate = post_validate

    def check_checkpoint(self, filename: str, state: dict[str, Any]) -> None:
        """A hook of xmoe_fairseq_compat: called on rank 0 before a checkpoint is loaded."""
        check_saved_settings(filename, state, self.given_model_cfg)

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        with self.explained("update", self.get_num_updates() + 1):
            try:
                output = super().train_step(samples, raise_oom)
            except FloatingPointError:  # fairseq has repeated the step, and names a parameter
                check_finite(self.get_model())
                raise
        if output is not None and self.is_data_parallel_master:  # None: the update was skipped
            self._load_report.after_update(self.get_num_updates())
        return output

    def valid_step(self, sample: Any, raise_oom: bool = False) -> Any:
        with self.explained("validation after update", self.get_num_updates()):
            output = super().valid_step(sample, raise_oom)
            check_finite(self.get_model())
        return output

    def _check_grad_norms(self, grad_norm: Tensor) -> None:
        """Before each update, where fairseq compares the ranks' norms: all ranks see a NaN of one of them."""
        model = self.get_model()
        super()._check_grad_norms(grad_norm + finite_so_far(model))
        check_finite(model)

    def get_train_iterator(self, *args: Any, **kwargs: Any) -> Any:
        with self.explained("update", self.get_num_updates() + 1):  # it reads a first batch
            batches = super().get_train_iterator(*args, **kwargs)
        batches.on_error = lambda error: self.tell(error, "update", self.get_num_updates() + 1)
        return batches

    def get_valid_iterator(self, subset: str, *args: Any, **kwargs: Any) -> Any:
        self._valid_subset = subset
        with self.explained("validation after update", self.get_num_updates()):
            batches = super().get_valid_iterator(subset, *args, **kwargs)
        batches.on_error = lambda error: self.tell(error, "validation after update", self.get_num_updates())
        return batches

    @contextmanager
    def explained(self, what: str, update: int) -> Iterator[None]:
        """Say where an error was, and which ranks are gone."""
        try:
            yield
        except Exception as error:
            self.tell(error, what, update)
            raise

    def tell(self, error: Exception, what: str, update: int) -> None:
        if dist.is_initialized():
            where = f"rank {dist.get_rank()} of {dist.get_world_size()}, {what} {update}"
            logger.error(f"{where}: {explain(error, update)}")

    def set_num_updates(self, num_updates: int) -> None:
        """Called on every rank, after an update that was not skipped; and when a checkpoint was loaded, where
        nothing has been counted yet.

        What is steered moves here, before anything is saved or validated. A model's own `set_num_updates`
        would be too late: fairseq calls it before the next forward.
        """
        super().set_num_updates(num_updates)
        self.router_kind.after_update(self.get_model())
        step_balance(self.get_model())
        tell_optimizer(self._optimizer, self.get_model())

    def _prepare_sample(self, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
        sample, is_dummy = super()._prepare_sample(sample, is_dummy)
        for module in self.get_model().modules():
            if isinstance(module, RouterKind):
                module.counting = not is_dummy
        return sample, is_dummy


@torch.no_grad()
def tell_optimizer(optimizer: Any, model: nn.Module) -> None:
    """What routers have set of their parameters; with --fp16 and --bf16 the optimizer holds copies in fp32,
    from which it would take them back. A copy that rounds to the parameter stays as it is."""
    copies = getattr(optimizer, "fp32_params", [])
    if isinstance(copies, dict):  # one flat tensor on a device
        (flat,) = copies.values()
        copies = flat.split([p.numel() for p in optimizer.fp16_params])
    own = {id(p) for m in model.modules() if isinstance(m, RouterKind) for p in m.parameters(recurse=False)}
    for p, copy in zip(optimizer.fp16_params if copies else (), copies, strict=True):
        if id(p) in own:
            exact = copy.view_as(p)
            exact.copy_(torch.where(exact.to(p.dtype) == p, exact, p.to(exact.dtype)))
