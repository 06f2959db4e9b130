"""fairseq's trainer for a model with a compute budget: it says when an update is done."""

from typing import Any

from fairseq.trainer import Trainer

from xmoe_fairseq.moe import Budget, step_budgets


class BudgetTrainer(Trainer):
    """Steers the thresholds after each update, before anything is saved or validated.

    A model's own `set_num_updates` would be too late for that: fairseq calls it before the next forward.
    """

    def set_num_updates(self, num_updates: int) -> None:
        """Called on every rank, after an update that was not skipped; and when a checkpoint was loaded, where
        nothing has been counted yet."""
        super().set_num_updates(num_updates)
        step_budgets(self.get_model())

    def _prepare_sample(self, sample: Any, is_dummy: bool = False) -> tuple[Any, bool]:
        sample, is_dummy = super()._prepare_sample(sample, is_dummy)
        for module in self.get_model().modules():
            if isinstance(module, Budget):
                module.counting = not is_dummy
        return sample, is_dummy
