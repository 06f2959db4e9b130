"""What a GPU would do, counted on a CPU: by the operations that code dispatches."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What makes a host wait for its GPU: a size or a value that only that knows, or a copy from its own memory.
WAITING = {
    "_local_scalar_dense", "nonzero", "argwhere", "masked_select", "is_nonzero", "equal", "bincount",
    "_unique2", "unique_dim", "unique_consecutive", "lift_fresh",
}  # fmt: skip
WAITING_METHODS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}  # which on a CPU dispatch nothing
# What raises there under torch.use_deterministic_algorithms(True), as its documentation says, or did once.
RAISING = {
    "put_", "histc", "kthvalue", "median.dim", "nanmedian.dim", "nll_loss2d_forward", "_ctc_loss",
    "_embedding_bag_dense_backward", "grid_sampler_2d", "scatter_reduce.two",
}  # fmt: skip
NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "_unsafe_view", "lift_fresh",
    "promote_types", "scalar_tensor",
}  # fmt: skip


class Dispatched(TorchDispatchMode):
    """Inside the `with` block: how often a host would wait and for what, kernels (operations that are no
    views, each of which starts one or more), what is refused under deterministic algorithms, and the bytes
    that are kept for a backward pass beside those of `known` tensors."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.saved: dict[int, Tensor] = {}
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._inside = (
            _Methods(self.waits),
            torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor),
        )

    @property
    def saved_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.saved.values())

    def _save(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.known:
            self.saved[place] = tensor
        return tensor

    def __enter__(self) -> "Dispatched":
        for context in self._inside:
            context.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for context in reversed(self._inside):
            context.__exit__(*error)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = op._schema.name.removeprefix("aten::"), kwargs or {}
        by_mask = name.startswith(("index", "_index_put")) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in listed(args)
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or unsized:
            self.waits[name] += 1
        if not (op.is_view or name in NO_KERNEL):
            self.kernels[name] += 1
        full = f"{name}.{op._overloadname}".removesuffix(".default")
        of_floats = name in ("cumsum", "cumsum_") and args[0].is_floating_point()
        weighed = name == "bincount" and len(args) > 1 and args[1] is not None
        if name in RAISING or full in RAISING or of_floats or weighed:
            self.refused[full] += 1
        return op(*args, **kwargs)


def listed(args: Any) -> list[Tensor | None]:
    """The indices of an operation."""
    return next((arg for arg in args if isinstance(arg, (list, tuple)) and arg), [])


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITING_METHODS:
            self.waits[function.__name__] += 1
        return function(*args, **kwargs or {})
