"""What mixed precision needs."""

from __future__ import annotations

from typing import Any

from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.registry import patch, replaced, wrap
from xmoe_fairseq_compat.settings import configuration


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


@patch("fairseq_cli.generate", "fairseq_cli.interactive", "fairseq_cli.eval_lm", "fairseq_cli.validate")
def evaluate_in_bf16(module: Any) -> None:
    """Every torch: the commands that evaluate know --fp16 alone, and pass over --bf16 and --amp."""

    @wrap(module, "main")
    def main(plain: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        cfg, utils = configuration(cfg), module.checkpoint_utils
        if cfg.common.amp:
            raise FlagError("--amp is for training: give --bf16 or --fp16")
        plain_load = utils.load_model_ensemble_and_task

        def load(*args: Any, **kwargs: Any) -> Any:  # the models of --path, and that of --lm-path
            loaded = plain_load(*args, **kwargs)
            for model in loaded[0] if cfg.common.bf16 else ():
                model.bfloat16()
            return loaded

        with replaced(utils, load_model_ensemble_and_task=load):
            return plain(cfg, *args, **kwargs)
