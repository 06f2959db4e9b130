"""fairseq-train, in which rank 1 is killed at its third update."""

import os
import signal
from typing import Any

from fairseq.tasks import FairseqTask
from fairseq_cli.train import cli_main

plain_step = FairseqTask.train_step


def step(self: Any, *args: Any, update_num: int, **kwargs: Any) -> Any:
    if (os.environ["RANK"], update_num) == ("1", 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain_step(self, *args, update_num=update_num, **kwargs)


if __name__ == "__main__":
    FairseqTask.train_step = step
    cli_main()
