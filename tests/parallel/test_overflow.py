"""One overflow in a forward under --fp16 is for the loss scaler, as in a dense model, and for all ranks."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from fairseq.tasks import FairseqTask
from parallel_runs import EXACT, MT, configured, fairseq_train, put_together, recorded

from xmoe_fairseq.moe import moe_layers

FP16 = ("--fp16", "--fp16-no-flatten-grads")


@pytest.mark.parametrize("ranks, precision", [(1, FP16), (2, FP16), (2, ("--memory-efficient-fp16",))])
def test_an_overflow_in_the_forward_skips_the_update(
    ranks: int, precision: tuple[str, ...], corpus: tuple[Path, Path]
) -> None:
    """In the third attempt inf comes to the first MoE layer, on one rank: 4 attempts are 3 updates."""
    flags = (
        corpus[0], *MT, *EXACT, *precision, "--fp16-init-scale", 4, "--moe-expert-parallel-size", ranks,
        "--max-update", 3, "--no-save", "--disable-validation",
    )  # fmt: skip
    configured(*map(str, flags))  # once for all ranks
    plain_step, seen, scalers = FairseqTask.train_step, [], []

    def step(self: Any, sample: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(sample)
        if len(seen) != 3 or (dist.is_initialized() and dist.get_rank() == 0):
            return plain_step(self, sample, model, *args, **kwargs)
        layer = moe_layers(model)[0]
        hook = layer.register_forward_pre_hook(lambda _, args: (args[0] * float("inf"), *args[1:]))
        try:
            return plain_step(self, sample, model, *args, **kwargs)
        finally:
            hook.remove()

    plain_init = DynamicLossScaler.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        scalers.append(self)
        plain_init(self, *args, **kwargs)

    def rank() -> dict[str, Any]:
        with (
            patch.object(FairseqTask, "train_step", step),
            patch.object(DynamicLossScaler, "__init__", init),
            recorded() as run,
        ):
            fairseq_train(*flags)
        return {**run, "scale": scalers[-1].loss_scale}

    runs = run_ranks(ranks, rank)
    put_together([run["weights"] for run in runs], runs[0]["experts"], ranks)
    for run in runs:
        assert (len(run["gradients"]), len(run["norms"])) == (4, 3)
        assert run["scale"] == 2
        assert torch.stack(run["norms"]).isfinite().all()
