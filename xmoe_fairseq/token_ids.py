"""Brings token ids to the layers that route by them: fairseq gives its layers vectors only."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn


class TokenIds:
    """The ids of the tokens that an encoder or decoder reads, for as long as it runs.

    Where fairseq enters the stack, the ids are noted; a layer gets them with its other arguments, so what is
    recomputed in the backward pass gets them again. fairseq's generator calls `decoder.forward` itself, past
    any hook on the stack, so it is the stack's innermost method that is wrapped.
    """

    def __init__(self, stack: nn.Module, side: str) -> None:
        self.ids_BL: Tensor | None = None
        method = "forward_scriptable" if side == "encoder" else "extract_features_scriptable"
        # A partial of a bound method, not a closure: a deep copy of the model (EMA) must note its own.
        setattr(stack, method, partial(self._note, getattr(stack, method)))

    def hand_to(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self._hand_over, with_kwargs=True)

    def _note(self, forward: Callable[..., Any], tokens_BL: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.ids_BL = tokens_BL
        try:
            return forward(tokens_BL, *args, **kwargs)
        finally:
            self.ids_BL = None

    def _hand_over(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "token_ids": self.ids_BL}
