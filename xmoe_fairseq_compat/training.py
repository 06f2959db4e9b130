"""What fairseq's trainer needs."""

from __future__ import annotations

import functools
import sys
from typing import Any

from xmoe_fairseq_compat.reading import tensors
from xmoe_fairseq_compat.registry import patch, stand_in, wrap


@patch("fairseq.trainer")
def model_may_bring_its_trainer(module: Any) -> None:
    """Every torch: the trainer takes it that all ranks hold the same parameters, and leaves a model no say.

    Its gradient norm, checkpoints and recovery from errors are wrong for those that lie on some ranks only.
    """

    def __new__(cls: Any, cfg: Any, task: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(getattr(model, "trainer_class", cls))

    module.Trainer.__new__ = __new__


@patch("fairseq.trainer")
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


@patch("fairseq.trainer")
def count_what_came_before_a_dummy_batch(module: Any) -> None:
    """Every torch: a rank whose last micro-batch of an update is a dummy loses the size of its real ones.

    So with --update-freq > 1 the last update of an epoch divides the gradient by too small a number. With the
    dummies first, and counted as nothing, the sum is right.
    """
    import torch

    def nothing(value: Any) -> Any:
        return torch.zeros_like(value) if torch.is_tensor(value) else 0

    @wrap(module.Trainer, "train_step")
    def train_step(plain: Any, self: Any, samples: Any, raise_oom: bool = False) -> Any:
        real = [sample for sample in samples if sample]
        dummies = [sample for sample in samples if not sample]
        if not (real and dummies):
            return plain(self, samples, raise_oom)
        plain_task_step = self.task.train_step

        def task_step(*args: Any, ignore_grad: bool = False, **kwargs: Any) -> Any:
            loss, size, log = plain_task_step(*args, ignore_grad=ignore_grad, **kwargs)
            if ignore_grad:
                size, log = nothing(size), {key: nothing(value) for key, value in log.items()}
            return loss, size, log

        self.task.train_step = task_step
        try:
            return plain(self, dummies + real, raise_oom)
        finally:
            del self.task.train_step


def not_finite(named_parameters: Any, first_found: str) -> str | None:
    """Which gradients are not finite, in one line that says what fairseq was handling; None if all are.

    Args:
        first_found: what the detector saw first.
    """
    import torch

    grads = {name: p.grad for name, p in named_parameters if p.grad is not None}
    norms = {name: torch.linalg.vector_norm(grad, dtype=torch.double) for name, grad in grads.items()}
    bad = [name for name, norm in norms.items() if not torch.isfinite(norm.square().float())]
    if not bad:
        return None
    where = f" ({first_found})" if first_found else ""
    cause = str(sys.exc_info()[1] or "").partition(". ")[0]
    before = "" if not cause or "Nan/Inf" in cause else f"{cause}; "
    return (
        f"{before}gradients of {len(bad)} of {len(grads)} parameters are NaN, inf or too large for"
        f" their norm, the first {bad[0]}{where}; lower --lr, or give --clip-norm or more"
        " --warmup-updates"
    )


@patch("fairseq.nan_detector")
def name_the_parameter_that_is_not_finite(module: Any) -> None:
    """Every torch: when gradients are NaN, fairseq makes the step again with a backward hook on every module.

    torch looks for a tensor in a module's output and fails on a record or an empty dict (TypeError,
    StopIteration); if it does not, whole gradients are printed, and no parameter is named at the end.
    """
    detector = module.NanDetector

    def add_hooks(self: Any, watched: Any) -> None:
        self.first_found = getattr(self, "first_found", "")
        self.fhooks.append(watched.register_forward_hook(self.fhook_fn))

    @wrap(detector, "fhook_fn")
    def fhook_fn(plain: Any, self: Any, watched: Any, inputs: Any, output: Any) -> None:
        plain(self, watched, inputs, output)
        for _, tensor in tensors(output):
            if getattr(tensor, "requires_grad", False):
                tensor.register_hook(functools.partial(self.bhook_fn, watched, inputs))

    @wrap(detector, "_detect")
    def detect(plain: Any, self: Any, *args: Any) -> Any:
        found = plain(self, *args)
        self.first_found = self.first_found or found or ""
        return found

    def __exit__(self: Any, kind: Any, error: Any, traceback: Any) -> None:
        self.close()
        text = not_finite(self.named_parameters, self.first_found) if error is None else None
        if text:
            raise FloatingPointError(text)

    detector.add_hooks, detector.__exit__ = add_hooks, __exit__


@patch("fairseq.optim.fp16_optimizer")
def flatten_on_cpu(module: Any) -> None:
    """Every torch: --fp16 keeps its flat copy of the parameters under the number of the current GPU. Without
    one it fails, and with one --cpu would train nothing, as a parameter's own device has another number."""
    import torch

    mixin = module._FP16OptimizerMixin

    @wrap(mixin, "build_fp32_params")
    def build_fp32_params(plain: Any, cls: Any, args: Any, params: Any, flatten: bool = True) -> Any:
        params = list(params)
        where_they_are = stand_in(torch.cuda, current_device=lambda: params[0].device.index)
        module.torch = stand_in(torch, cuda=where_they_are)
        return plain(cls, args, params, flatten)


@patch("fairseq.tasks.fairseq_task")
def autocast_on_cpu(module: Any) -> None:
    """Every torch: --amp turns on the autocast of GPUs alone, so that a CPU computes in fp32 all the same."""
    import torch

    @wrap(module.FairseqTask, "train_step")
    def train_step(
        plain: Any, self: Any, sample: Any, model: Any, criterion: Any, optimizer: Any, *args: Any, **kw: Any
    ) -> Any:
        def in_bf16(model: Any, sample: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return criterion(model, sample)

        is_amp = isinstance(optimizer, module.AMPOptimizer) and next(model.parameters()).is_cpu
        return plain(self, sample, model, in_bf16 if is_amp else criterion, optimizer, *args, **kw)


@patch("fairseq_cli.train")
def count_experts(module: Any) -> None:
    """Every torch: parameters of "experts" (fairseq's word) are counted by a mark that also keeps them out of
    DDP and of the gradient norm. Where every rank holds all, which so have none, the log says there are 0.

    `is_expert` is a mark for the count alone.
    """

    def has_mark(thing: Any, name: str, *default: Any) -> Any:
        return (name == "expert" and hasattr(thing, "is_expert")) or getattr(thing, name, *default)

    module.getattr = has_mark


@patch("fairseq_cli.train")
def stop_where_the_run_has_ended(module: Any) -> None:
    """Every torch: a run that has made all its --max-update updates makes one more whenever it is resumed."""

    @wrap(module, "train")
    def train(plain: Any, cfg: Any, trainer: Any, *args: Any) -> Any:
        most = cfg.optimization.max_update
        if 0 < most <= trainer.get_num_updates():
            module.logger.info(f"nothing left to train: all --max-update {most} updates were made before")
            return [None], True
        return plain(cfg, trainer, *args)
