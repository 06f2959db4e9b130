"""Where the time of an update goes: forward and backward of each part of a model, optimizer, statistics."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from fairseq.trainer import Trainer
from torch import Tensor, nn

from xmoe_fairseq.moe import RoutedLayer, Routing

REST, MODEL, CRITERION = "everything else", "norms, residuals, dropout", "criterion"
EMBEDDING, ATTENTION, FFN, OUTPUT = "embedding", "attention", "dense FFN", "output layer"
MOE, ROUTER, EXPERTS = "MoE layer, between its parts", "router", "experts"
STEPS = {  # methods of a trainer
    "random seeds": ("_set_seed",),
    "preparing the batch": ("_prepare_sample",),
    "zeroing gradients": ("zero_grad",),
    "mean of gradients": ("optimizer.multiply_grads", "optimizer.all_reduce_grads"),
    "clip norm": ("clip_grad_norm",),
    "optimizer": ("optimizer.step",),
    "learning rate and budgets": ("set_num_updates",),
    "fairseq's statistics": ("_reduce_and_log_stats",),
}
Part = tuple[str, bool]  # a name; whether it is the backward pass


class Clock:
    """Time goes to one part after the other."""

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = defaultdict(float)
        self.part: Part = (REST, False)
        self.since = time.perf_counter()

    def switch(self, part: Part) -> Part:
        """Returns the part before."""
        before, now = self.part, time.perf_counter()
        self.seconds[before] += now - self.since
        self.part, self.since = part, now
        return before


class Mark(torch.autograd.Function):
    """The identity, where one part ends; in the backward pass time goes to it again from here on.

    Autograd runs what is ready in the reverse order of its creation: all of the part after the mark has run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, before: str) -> Tensor:
        ctx.clock, ctx.before = clock, before
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.switch((ctx.before, True))
        return grad, None, None


def marked(value: Any, clock: Clock, before: str) -> Any:
    """With a mark on the first tensor that has a gradient; of a routing on the weights."""
    if isinstance(value, Tensor):
        return Mark.apply(value, clock, before) if value.requires_grad else value  # type: ignore[no-untyped-call]
    if isinstance(value, Routing):
        return replace(value, weight_R=marked(value.weight_R, clock, before))
    if isinstance(value, (tuple, list)) and value:
        return type(value)([marked(value[0], clock, before), *value[1:]])
    return value


class Hooks:
    """Forward hooks that hand the time to parts; for as long as `installed`."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.handles, self.outer = clock, [], []  # type: ignore[var-annotated]

    def enter(self, part: str, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        before = self.clock.switch((part, False))
        self.outer.append(before)
        if args:
            return marked(args, self.clock, before[0]), kwargs
        first = next(iter(kwargs), None)
        return args, kwargs if first is None else kwargs | {
            first: marked(kwargs[first], self.clock, before[0])
        }

    def leave(self, part: str, module: nn.Module, args: Any, output: Any) -> Any:
        self.clock.switch(self.outer.pop())
        return marked(output, self.clock, part)

    def add(self, part: str, first: nn.Module, last: nn.Module | None = None) -> None:
        self.handles += [
            first.register_forward_pre_hook(partial(self.enter, part), with_kwargs=True),
            (last or first).register_forward_hook(partial(self.leave, part)),
        ]


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Part, and the modules with which it begins and ends."""
    yield MODEL, model, model
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, RoutedLayer):
            yield MOE, module, module
            for part, inner in ((ROUTER, "router"), (EXPERTS, "experts")):
                if hasattr(module, inner):
                    yield part, getattr(module, inner), getattr(module, inner)
        elif isinstance(module, MultiheadAttention):
            yield ATTENTION, module, module
        elif last in ("embed_tokens", "embed_positions"):
            yield EMBEDDING, module, module
        elif last == "output_projection":
            yield OUTPUT, module, module
        elif isinstance(getattr(module, "fc1", None), nn.Module):
            yield FFN, module.fc1, module.fc2


@contextmanager
def timed_parts(trainer: Trainer) -> Iterator[Clock]:
    """In the block a clock has the time of each part of the trainer's updates."""
    clock, patched = Clock(), []
    hooks = Hooks(clock)
    hooks.add(CRITERION, trainer.criterion)
    for each in parts_of(trainer.model):
        hooks.add(*each)
    steps = {name: (part, False) for part, names in STEPS.items() for name in names}
    for path, part in (steps | {"optimizer.backward": (CRITERION, True)}).items():
        owner = trainer.optimizer if path.startswith("optimizer.") else trainer
        name = path.rpartition(".")[2]
        setattr(owner, name, during(clock, part, getattr(owner, name)))
        patched.append((owner, name))
    try:
        yield clock
    finally:
        for owner, name in patched:
            delattr(owner, name)
        for handle in hooks.handles:
            handle.remove()


def during(clock: Clock, part: Part, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        before = clock.switch(part)
        try:
            return function(*args, **kwargs)
        finally:
            clock.switch(before)

    return run


def time_by_part(trainer: Trainer, update: Callable[[], None], rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds forward and backward of each part of an update; they add up to all of it."""
    with timed_parts(trainer) as clock:
        update()
        clock.switch(clock.part)
        clock.seconds.clear()
        for _ in range(rounds):
            update()
        clock.switch(clock.part)
    times = {part: 1000 * seconds / rounds for part, seconds in clock.seconds.items()}
    names = dict.fromkeys(name for name, _ in times)
    return {name: (times.get((name, False), 0.0), times.get((name, True), 0.0)) for name in names}
