"""A layer that is computed again in the backward pass, to save memory, must choose the same experts.

Its input may differ in the last bit (a GPU adds in another order), and a score that lay at the threshold then
lies on its other side: other rows, so tensors of other sizes, which torch refuses; and ranks would exchange
other rows than before. So a router's scores are kept, E numbers for a token. All else is computed again.
"""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

See = Callable[[Tensor], Tensor]
_here = threading.local()  # a backward pass may have threads of its own; torch.compile knows no ContextVar


def keep_scores() -> tuple["_Seen", "_Seen"]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=keep_scores)`."""
    kept: list[Tensor] = []

    def keep(scores_TE: Tensor) -> Tensor:
        kept.append(scores_TE.detach())
        return scores_TE

    def replay() -> See:
        of_calls = iter(kept)
        # What is computed again is tensors only: gradients go by the graph of the first time.
        return lambda scores_TE: next(of_calls).detach().requires_grad_(scores_TE.requires_grad)

    return _Seen(lambda: keep), _Seen(replay)


def first_scores(scores_TE: Tensor) -> Tensor:
    """These, or where a layer is computed again those of the first time."""
    see: See | None = getattr(_here, "see", None)
    return scores_TE if see is None else see(scores_TE)


class _Seen:
    """A block whose routers' scores are seen; torch enters it anew for each backward pass."""

    def __init__(self, begin: Callable[[], See]) -> None:
        self.begin = begin

    def __enter__(self) -> None:
        self.before, _here.see = getattr(_here, "see", None), self.begin()

    def __exit__(self, *_: Any) -> None:
        _here.see = self.before
