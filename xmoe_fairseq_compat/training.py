"""What fairseq's trainer needs."""

from __future__ import annotations

from typing import Any

from xmoe_fairseq_compat.registry import mend, stand_in


@mend("fairseq.trainer")
def model_may_bring_its_trainer(module: Any) -> None:
    """Every torch: the trainer takes it that all ranks hold the same parameters, and leaves a model no say.

    Its gradient norm, checkpoints and recovery from errors are wrong for experts that lie on some ranks.
    """

    def __new__(cls: Any, cfg: Any, task: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(getattr(model, "trainer_class", cls))

    module.Trainer.__new__ = __new__


@mend("fairseq.trainer")
def skip_an_overflow_on_cpu(module: Any) -> None:
    """Every torch: where --fp16 skips an update whose gradients overflowed, the norm is put on a GPU."""
    import torch

    class OnHost(torch.Tensor):
        def cuda(self, *args: Any, **kwargs: Any) -> Any:
            return self.as_subclass(torch.Tensor)

    if not torch.cuda.is_available():
        module.torch = stand_in(
            torch, tensor=lambda *args, **kw: torch.tensor(*args, **kw).as_subclass(OnHost)
        )


@mend("fairseq.trainer")
def count_what_came_before_a_dummy_batch(module: Any) -> None:
    """Every torch: a rank whose last micro-batch of an update is a dummy loses the size of its real ones.

    So with --update-freq > 1 the last update of an epoch divides the gradient by too small a number. With the
    dummies first, and counted as nothing, the sum is right.
    """
    import torch

    plain_step = module.Trainer.train_step

    def nothing(value: Any) -> Any:
        return torch.zeros_like(value) if torch.is_tensor(value) else 0

    def train_step(self: Any, samples: Any, raise_oom: bool = False) -> Any:
        real = [sample for sample in samples if sample]
        dummies = [sample for sample in samples if not sample]
        if not (real and dummies):
            return plain_step(self, samples, raise_oom)
        plain_task_step = self.task.train_step

        def task_step(*args: Any, ignore_grad: bool = False, **kwargs: Any) -> Any:
            loss, size, log = plain_task_step(*args, ignore_grad=ignore_grad, **kwargs)
            if ignore_grad:
                size, log = nothing(size), {key: nothing(value) for key, value in log.items()}
            return loss, size, log

        self.task.train_step = task_step
        try:
            return plain_step(self, dummies + real, raise_oom)
        finally:
            del self.task.train_step

    module.Trainer.train_step = train_step


@mend("fairseq.optim.fp16_optimizer")
def flatten_on_cpu(module: Any) -> None:
    """Every torch: --fp16 keeps its flat copy of the parameters under the number of the current GPU. Without
    one it fails, and with one --cpu would train nothing, as a parameter's own device has another number."""
    import torch

    mixin = module._FP16OptimizerMixin
    plain_build = mixin.build_fp32_params.__func__

    def build_fp32_params(cls: Any, args: Any, params: Any, flatten: bool = True) -> Any:
        params = list(params)
        where_they_are = stand_in(torch.cuda, current_device=lambda: params[0].device.index)
        module.torch = stand_in(torch, cuda=where_they_are)
        return plain_build(cls, args, params, flatten)

    mixin.build_fp32_params = classmethod(build_fp32_params)


@mend("fairseq.tasks.fairseq_task")
def autocast_on_cpu(module: Any) -> None:
    """Every torch: --amp turns on the autocast of GPUs alone, so that a CPU computes in fp32 all the same."""
    import torch

    plain_step = module.FairseqTask.train_step

    def train_step(
        self: Any, sample: Any, model: Any, criterion: Any, optimizer: Any, *args: Any, **kw: Any
    ) -> Any:
        def in_bf16(model: Any, sample: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return criterion(model, sample)

        is_amp = isinstance(optimizer, module.AMPOptimizer) and next(model.parameters()).is_cpu
        return plain_step(self, sample, model, in_bf16 if is_amp else criterion, optimizer, *args, **kw)

    module.FairseqTask.train_step = train_step


@mend("fairseq_cli.train")
def stop_where_the_run_has_ended(module: Any) -> None:
    """Every torch: a run that has made all its --max-update updates makes one more whenever it is resumed."""
    plain_train = module.train

    def train(cfg: Any, trainer: Any, *args: Any) -> Any:
        most = cfg.optimization.max_update
        if 0 < most <= trainer.get_num_updates():
            module.logger.info(f"nothing left to train: all --max-update {most} updates were made before")
            return [None], True
        return plain_train(cfg, trainer, *args)

    module.train = train
