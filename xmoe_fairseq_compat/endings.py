"""How a command ends that its user or another process has ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.registry import patch, patch_around, wrap

GO_ON = ("fairseq-train", "fairseq-hydra-train")  # the others begin anew


@patch_around("fairseq")
def end_an_interruption_with_one_line(module: Any) -> Iterator[None]:
    """Every torch: Ctrl-C ends a command with a page of where it was just then, also while it starts."""

    @wrap(sys, "excepthook")
    def excepthook(plain: Any, kind: Any, error: BaseException, traceback: Any) -> None:
        command = os.path.basename(sys.argv[0])
        if isinstance(error, KeyboardInterrupt) and (
            command.startswith("fairseq-") or plugins.is_command(command)
        ):
            how = "; run it again to go on" if command in GO_ON else ""
            print(f"{command}: interrupted{how}", file=sys.stderr)
        else:
            plain(kind, error, traceback)

    yield


def user_error_in(page: str) -> UserError | None:
    """The UserError that ends the traceback of another process, if it is one."""
    name, _, text = page.strip().rpartition("\n")[2].partition(": ")
    module, _, kind = name.rpartition(".")
    found = getattr(sys.modules.get(module), kind, None)
    return UserError(text) if isinstance(found, type) and issubclass(found, UserError) else None


@patch("fairseq.distributed.utils")
def one_line_from_spawned_ranks(module: Any) -> None:
    """Every torch: without torchrun fairseq starts a process for each GPU, and what is wrong in one of them
    comes as a page of where it was."""
    from torch.multiprocessing import ProcessRaisedException

    @wrap(module, "call_main")
    def call_main(plain: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain(*args, **kwargs)
        except ProcessRaisedException as error:
            told = user_error_in(str(error))
            if told:
                raise told from None
            raise
