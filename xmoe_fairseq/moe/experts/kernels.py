"""Ways to compute the experts, by name, and the one place where one of them is chosen."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe_fairseq.moe.dispatch.rows import ExpertRows

Activation = Callable[[Tensor], Tensor]
AUTO, PLAIN = "auto", "plain"


class Stacks(NamedTuple):
    """The parameters of E experts of width F, in the `nn.Linear` convention."""

    fc1_weight: Tensor  # (E, F, D)
    fc1_bias: Tensor  # (E, F)
    fc2_weight: Tensor  # (E, D, F)
    fc2_bias: Tensor  # (E, D)


class Call(NamedTuple):
    """The arguments of a kernel, in their order."""

    x_SD: Tensor  # source rows
    rows: ExpertRows
    stacks: Stacks
    activation: Activation
    dropout: float = 0.0  # probability after the activation

    @property
    def dtype(self) -> torch.dtype:
        """In which the experts compute: x's, or autocast's."""
        device = self.x_SD.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.x_SD.dtype


class Kernel(NamedTuple):
    name: str
    compute: Callable[..., Tensor]
    refuses: Callable[[Call], str]
    preference: int
    device: str


class _Forced(threading.local):  # not a ContextVar, which torch.compile cannot read
    name = ""


_KERNELS: dict[str, Kernel] = {}  # the most preferred first
_forced = _Forced()


class KernelError(ValueError):
    """A kernel was asked for by name that cannot take a call; one line says why."""


def register_kernel(
    name: str, refuses: Callable[[Call], str] = lambda call: "", preference: int = 0, device: str = ""
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """A function that takes the fields of a `Call` and gives what `expert_sums_plain` does, gradients too.

    Under autocast it gets x and the stacks in autocast's precision, and runs with autocast off.

    Args:
        refuses: of a call: what the kernel needs and what it got instead, "a CPU, got cuda"; "" = it can.
        preference: "auto" takes the first that can, the highest first; 0 = never, only by name.
        device: the type of device on which "auto" takes it; "" = on all.

    Raises:
        ValueError: the name is another function's.
    """

    def register(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        other = _KERNELS[name].compute if name in _KERNELS else compute
        if name == AUTO or (other.__module__, other.__qualname__) != (
            compute.__module__,
            compute.__qualname__,
        ):
            raise ValueError(f"kernel {name} is registered already; give yours another name")
        kernels = [k for k in _KERNELS.values() if k.name != name]
        kernels.append(Kernel(name, compute, refuses, preference, device))
        _KERNELS.clear()
        _KERNELS.update({kernel.name: kernel for kernel in sorted(kernels, key=lambda k: -k.preference)})
        return compute

    return register


def kernel_names() -> tuple[str, ...]:
    """What may be asked for: "auto", then all kernels, the most preferred first."""
    return AUTO, *_KERNELS


def check_kernel(name: str) -> None:
    """Raises ValueError for what is not registered."""
    if name not in kernel_names():
        raise ValueError(f"kernel must be one of {', '.join(kernel_names())}, got {name}")


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """All experts compute by this kernel inside the `with` block, whatever their layers were built with.

    It holds for the thread that enters the block, until the block ends. A forward pass that is repeated in
    the backward pass (activation checkpointing) must find the same: give the layer the kernel.

    Args:
        name: a registered one, or "auto" for the choice by device, precision, size and activation. "plain"
            means routers too: they choose in Python.

    Raises:
        ValueError: there is none of this name. In the block, a call that the kernel cannot take raises
            KernelError, which is one too.
    """
    check_kernel(name)
    before, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = before


def forced_kernel() -> str:
    """What `use_kernel` names here; "" outside its block."""
    return _forced.name


def choose_kernel(call: Call, name: str = AUTO) -> Kernel:
    """The kernel that `use_kernel` names, else `name`; of "auto" the first that can.

    Raises:
        KernelError: it cannot take this call.
    """
    name = _forced.name or name
    if name == AUTO:
        here = ("", call.x_SD.device.type)
        return next(k for k in _KERNELS.values() if k.preference and k.device in here and not k.refuses(call))
    check_kernel(name)
    if needed := _KERNELS[name].refuses(call):
        raise KernelError(f"kernel {name} (use_kernel, --moe-kernel) needs {needed}")
    return _KERNELS[name]


def expert_sums(call: Call, name: str = AUTO) -> Tensor:
    """(S, D) by the kernel that `choose_kernel` finds. Raises KernelError."""
    kernel, device = choose_kernel(call, name), call.x_SD.device.type
    if not torch.compiler.is_compiling():
        _say(kernel.name, device, call.dtype)
    # Plain autograd casts by itself, product by product, and adds up x's gradient in x's precision.
    if kernel.name == PLAIN or not torch.is_autocast_enabled(device):
        return kernel.compute(*call)
    stacks = Stacks(*(stack.to(call.dtype) for stack in call.stacks))
    call = call._replace(x_SD=call.x_SD.to(call.dtype), stacks=stacks)
    with torch.autocast(device, enabled=False):
        return kernel.compute(*call)


@cache
def _say(kernel: str, device: str, dtype: torch.dtype) -> None:
    """Once for each that runs."""
    logging.getLogger(__name__).info(f"experts are computed by kernel {kernel} ({device}, {dtype})")
