"""What is refused at the start, and would fail later, after an epoch, or not at all."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

from xmoe_fairseq_compat.errors import CheckpointError, FlagError
from xmoe_fairseq_compat.registry import patch, wrap


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that holds it
        return False


def has_gpu(cfg: Any) -> bool:
    import torch

    return torch.cuda.is_available() and not cfg.common.cpu


def is_backend(name: str) -> Callable[[Any], bool]:
    return lambda cfg: str(cfg.distributed_training.ddp_backend) == name


def ranks_of_torchrun() -> int:
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def validates(cfg: Any) -> bool:
    return not cfg.dataset.disable_validation


def follows_the_loss(cfg: Any) -> bool:
    return getattr(cfg.lr_scheduler, "_name", None) == "reduce_lr_on_plateau"


WITH_VALIDATION = "validation; leave out --disable-validation"
INSTEAD = "use --ddp-backend legacy_ddp or pytorch_ddp"
# Flag, whether it is given, whether it can work, and what it needs.
NEEDS: tuple[tuple[str, Callable[[Any], bool], Callable[[Any], bool], str], ...] = (
    ("--patience", lambda cfg: cfg.checkpoint.patience > 0, validates, WITH_VALIDATION),
    ("--lr-scheduler reduce_lr_on_plateau", follows_the_loss, validates, WITH_VALIDATION),
    ("--tpu", lambda cfg: cfg.common.tpu, lambda cfg: has_module("torch_xla"), "torch_xla; leave it out"),
    ("--ddp-backend fully_sharded", is_backend("fully_sharded"), has_gpu, f"GPUs; {INSTEAD}"),
    ("--ddp-backend slowmo", is_backend("slowmo"), has_gpu, f"GPUs; {INSTEAD}"),
    (
        "--ddp-backend fully_sharded",
        is_backend("fully_sharded"),
        lambda cfg: (
            cfg.distributed_training.distributed_world_size > 1 or has_module("fairscale.utils.testing")
        ),
        f"several GPUs, or fairscale below 0.4.6; {INSTEAD}",
    ),
    (
        "--distributed-backend nccl, the default,",
        lambda cfg: cfg.distributed_training.distributed_backend == "nccl" and ranks_of_torchrun() > 1,
        lambda cfg: not cfg.common.cpu,
        "GPUs; give --distributed-backend gloo with --cpu",
    ),
)  # fmt: skip


@patch("fairseq.distributed.utils")
def refuse_what_is_not_installed(module: Any) -> None:
    """Every torch: a flag for which a library, a GPU or the validation is missing ends in an exception of
    whatever it meets first, or is passed over (--patience; slowmo in one process)."""

    @wrap(module, "call_main")
    def call_main(plain: Any, cfg: Any, main: Any, **kwargs: Any) -> Any:
        for flag, is_given, can_work, need in NEEDS:
            if is_given(cfg) and not can_work(cfg):
                raise FlagError(f"{flag} needs {need}")
        return plain(cfg, main, **kwargs)


@patch("fairseq.distributed.utils")
def refuse_more_ranks_than_gpus(module: Any) -> None:
    """Every torch: --distributed-world-size 2 on a machine without GPUs ends in an AssertionError that names
    neither the flag nor torchrun."""

    @wrap(module, "_infer_single_node_init")
    def _infer_single_node_init(plain: Any, cfg: Any) -> None:
        import torch

        gpus = torch.cuda.device_count()
        if cfg.distributed_world_size > gpus:
            raise FlagError(
                f"--distributed-world-size must be at most the number of GPUs, {gpus}, got "
                f"{cfg.distributed_world_size}; torchrun starts several processes on CPUs"
            )
        plain(cfg)


@patch("fairseq.optim")
def name_the_missing_optimizer(module: Any) -> None:
    """Every torch: training without --optimizer ends in a traceback ("optimizer is required!")."""

    @wrap(module, "build_optimizer")
    def build_optimizer(plain: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if cfg is None:
            raise FlagError("--optimizer must be given, such as --optimizer adam")
        return plain(cfg, *args, **kwargs)


@patch("fairseq_cli.train")
def refuse_a_store_that_is_gone(module: Any) -> None:
    """Every torch: --use-plasma-view starts a program of pyarrow's, which was taken out in version 12."""
    plain_store = module.PlasmaStore

    def store(*args: Any, **kwargs: Any) -> Any:
        if shutil.which("plasma_store") is None:
            raise FlagError(
                "--use-plasma-view needs plasma_store, which pyarrow had up to version 11; leave it out"
            )
        return plain_store(*args, **kwargs)

    module.PlasmaStore = store


@patch("fairseq.checkpoint_utils")
def refuse_weights_that_are_no_numbers(module: Any) -> None:
    """Every torch: a checkpoint that holds NaN is opened like any other, and everything it makes is NaN."""
    import torch

    @wrap(module, "load_checkpoint_to_cpu")
    def load_checkpoint_to_cpu(plain: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        state = plain(path, *args, **kwargs)
        model = state.get("model")
        for name, weight in model.items() if isinstance(model, dict) else ():
            # fairseq never sets the buffer of that name
            is_float = torch.is_tensor(weight) and weight.is_floating_point() and "_float_tensor" not in name
            # The sum is NaN if a weight is, and takes an eighth of the time; two infinities make it NaN too.
            if is_float and weight.sum().isnan() and weight.isnan().any():
                raise CheckpointError(path, f"it holds NaN in {name}; take an earlier checkpoint")
        return state


@patch("fairseq_cli.train")
def refuse_a_metric_that_nobody_logs(module: Any) -> None:
    """Every torch: a --best-checkpoint-metric that validation does not log fails after the first epoch, where
    nothing has been saved yet. One batch is validated to see what there is."""

    def check(cfg: Any, trainer: Any) -> None:
        metric, (subset, *_) = cfg.checkpoint.best_checkpoint_metric, cfg.dataset.valid_subset.split(",")
        batches = trainer.get_valid_iterator(subset).next_epoch_itr(shuffle=False, set_dataset_epoch=False)
        if len(batches) == 0:
            return
        with module.metrics.aggregate(new_root=True) as logged:
            trainer.valid_step(next(iter(batches)))
        names = sorted({*logged.get_smoothed_values(), "num_updates"})
        if metric not in names:
            how = "; add --eval-bleu" if metric == "bleu" else ""
            raise FlagError(
                f"--best-checkpoint-metric must be one that validation logs ({', '.join(names)}), "
                f"got {metric}{how}"
            )

    @wrap(module, "train")
    def train(plain: Any, cfg: Any, trainer: Any, task: Any, *args: Any) -> Any:
        is_sure = cfg.checkpoint.best_checkpoint_metric == "loss" or hasattr(type(task), "post_validate")
        if not (is_sure or cfg.dataset.disable_validation or hasattr(trainer, "metric_is_checked")):
            check(cfg, trainer)
            trainer.metric_is_checked = True
        return plain(cfg, trainer, task, *args)
