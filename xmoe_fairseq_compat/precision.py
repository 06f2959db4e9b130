"""What mixed precision needs."""

from __future__ import annotations

from typing import Any

from xmoe_fairseq_compat.registry import patch


@patch("fairseq.optim.amp_optimizer")
def unscale_once(module: Any) -> None:
    """Every torch: --amp divides the gradients by the loss scale for clipping, and again for the step.

    A GradScaler remembers by the optimizer what it has divided, and is given fairseq's the one time and
    torch's the other: it is torch's both times now. (Adam hides it, but for its epsilon; SGD hardly moves.)
    """

    def step(self: Any) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    module.AMPOptimizer.step = step
