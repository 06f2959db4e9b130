"""A model that a checkpoint describes is built within what the checkpoint holds.

Its patch must be outside those of checkpoints.py, which put a checkpoint together from its files: so the
files' names have it (registry.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.registry import patch, wrap

# As many times as large may a model be as its checkpoint: some parameters are built to be replaced or shared.
# How many times is a choice.
VALUES, PARAMETERS = 8, 4
# And so much more: tables of positions, say, are not saved. (2^28 values: 1 GB in fp32.)
MORE_VALUES, MORE_PARAMETERS = 2**28, 1000
COUNTS = ("arange", "randperm")  # these take a number, not a size


# Open while fairseq opens checkpoints to build their models; entered anew for each of them.
_building: ContextVar[ExitStack | None] = ContextVar("building", default=None)


class Limit:
    """What may be built of a checkpoint, and what has been by now."""

    def __init__(self, path: Any, state: Any) -> None:
        held = [value.numel() for value in state["model"].values() if hasattr(value, "numel")]
        self.path, self.held_values, self.held_parameters = path, sum(held), len(held)
        self.values = self.parameters = 0

    def count(self, module: Any, name: str, parameter: Any) -> None:
        if parameter is not None:
            self.values += parameter.numel()
            self.parameters += 1
            self.check(self.values)

    def check(self, values: int) -> None:
        """Raises CheckpointError if so many values at once, or parameters by now, are too many."""
        if (
            values > VALUES * self.held_values + MORE_VALUES
            or self.parameters > PARAMETERS * self.held_parameters + MORE_PARAMETERS
        ):
            raise CheckpointError(
                self.path,
                "its configuration, or what overrides it, asks for more than"
                f" {max(values, self.values):,} values in {self.parameters:,} parameters, and it holds"
                f" {self.held_values:,} in {self.held_parameters:,}; do not use it",
            )


@contextmanager
def within(path: Any, state: Any) -> Iterator[None]:
    """In this block a tensor or model that is far larger than a checkpoint is not built.

    Args:
        state: what the checkpoint at `path` holds.

    Raises:
        CheckpointError: names the checkpoint, and both sizes.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from torch.utils._python_dispatch import TorchDispatchMode

    limit = Limit(path, state)

    class Within(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            limit.check(size_of_result(func, args))
            return func(*args, **(kwargs or {}))

    hook = register_module_parameter_registration_hook(limit.count)
    try:
        with Within():  # type: ignore[no-untyped-call]
            yield
    finally:
        hook.remove()


def size_of_result(func: Any, args: Any) -> int:
    """How many values an operation of torch will make: at least, as far as its arguments tell."""
    import torch

    shapes = [value.shape for value in args if isinstance(value, torch.Tensor)]
    sizes = [
        value for value in args if isinstance(value, (list, tuple)) and all(type(n) is int for n in value)
    ]
    if func._schema.name.partition("::")[2] in COUNTS:
        sizes += [[abs(int(value))] for value in args[:2] if isinstance(value, (int, float))]
    with suppress(RuntimeError):  # of shapes that do not fit: a product of matrices, say
        sizes.append(torch.broadcast_shapes(*shapes))
    return max((math.prod(size) for size in sizes), default=0)


@patch("fairseq.checkpoint_utils")
def build_within_what_a_checkpoint_holds(module: Any) -> None:
    """Every torch: a model is built as its checkpoint's configuration says, of 10^6 layers if it says so."""

    def begin(building: ExitStack, path: Any, state: Any) -> None:
        if "fsdp_metadata" not in state:  # whose parameters are flattened into few, those of one rank
            building.enter_context(within(path, state))

    @wrap(module, "load_checkpoint_to_cpu")
    def load_checkpoint_to_cpu(plain: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        building = _building.get()
        if building is None:  # whoever reads it builds nothing of it
            return plain(path, *args, **kwargs)
        building.close()
        state = plain(path, *args, **kwargs)
        begin(building, path, state)
        return state

    @wrap(module, "load_model_ensemble_and_task")
    def load_model_ensemble_and_task(plain: Any, filenames: Any, *args: Any, **kwargs: Any) -> Any:
        state = kwargs.get("state", dict(enumerate(args)).get(5))  # where it was read before
        with ExitStack() as building:
            token = _building.set(building)
            try:
                if state is not None:
                    begin(building, filenames[0], state)
                return plain(filenames, *args, **kwargs)
            finally:
                _building.reset(token)
