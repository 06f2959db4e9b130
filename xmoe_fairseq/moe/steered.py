"""State of a router that is steered: after each update, by what was counted since the one before."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MANY = 200  # forward passes without a step after which there is a warning: a choice


class Steered(nn.Module):
    """Its buffers are the state, fp32 or more whatever the model is. What is counted is each rank's own, and
    never saved.

    Args:
        asked: what has asked for it, for warnings.
        stepped_by: the function of `xmoe_fairseq.moe` that moves it.
        num_counts: C, how many numbers are counted.
        dtype: of what is counted.
    """

    def __init__(self, asked: str, stepped_by: str, num_counts: int, dtype: torch.dtype = torch.long) -> None:
        super().__init__()
        self.asked, self.stepped_by, self.num_counts, self.dtype = asked, stepped_by, num_counts, dtype
        self._counts_C: Tensor | None = None
        self._forwards = self._steps = 0  # in training

    def counts(self, device: torch.device) -> Tensor:
        """(C,) what has been counted by now; one forward pass in training is going to add to it."""
        if self._counts_C is None:
            self._counts_C = torch.zeros(self.num_counts, dtype=self.dtype, device=device)
        if torch.compiler.is_compiling():  # each number of passes would be a graph of its own
            return self._counts_C
        self._forwards += 1
        if self._forwards == MANY and not self._steps:
            warnings.warn(
                f"{self.asked}: {MANY} forward passes in training, and all is still where it began; call "
                f"xmoe_fairseq.moe.{self.stepped_by}(model) after each update",
                stacklevel=3,
            )
        return self._counts_C

    def pop_counts(self) -> Tensor:
        """(C,) what was counted since the last time, on the device of the state."""
        counts_C, self._counts_C = self._counts_C, None
        self._steps += 1
        counts_C = torch.zeros(self.num_counts, dtype=self.dtype) if counts_C is None else counts_C
        return counts_C.to(next(self.buffers()).device)

    def step(self, counts_C: Tensor) -> None:
        """Move, by what all ranks have counted since the last time."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Steered":
        """`half()` and `bfloat16()` leave the state as it is; it only moves to the device."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The checkpoint of a model that was not steered has no state: it begins here."""
        for name, value in self.named_buffers():
            state_dict.setdefault(f"{prefix}{name}", value)
        super()._load_from_state_dict(state_dict, prefix, *args)


def of_all_ranks(counts: Tensor) -> Tensor:
    """Their sum, in place: one exchange, which all ranks must enter."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    return counts


@torch.no_grad()
def step_each(model: nn.Module, kind: type[Steered]) -> None:
    """Move the state of all of this kind in `model`; to be called after each update.

    With torch.distributed the counts of all ranks are added up in one exchange, which all ranks must enter:
    W ranks then go as one that saw all the tokens.
    """
    steered = [module for module in model.modules() if isinstance(module, kind)]
    if not steered:
        return
    counts = of_all_ranks(torch.cat([each.pop_counts() for each in steered]))
    for each, counts_C in zip(steered, counts.split([each.num_counts for each in steered]), strict=True):
        each.step(counts_C)
