"""Evaluation on several ranks: they share out the batches, and rank 0 prints what one process would."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.overrides import asked_for
from xmoe_fairseq_compat.registry import replaced, stand_in, wrap
from xmoe_fairseq_compat.settings import configuration


class Turns:
    """Batch i is computed by rank i mod W.

    Rank 0 goes through all batches in their order, and has from the others what they computed; so whatever
    a command makes of it is by construction what one process makes of it. The others go through their own
    batches, and print nothing. All read all batches: a context window needs the one before.
    """

    def __init__(self, cfg: Any) -> None:
        """Takes the ranks out of the configuration: each is to read as one process does."""
        import torch

        self.on_gpu = torch.cuda.is_available() and not cfg.common.cpu
        self.rank, self.size, self.batch = 0, 1, 0
        self.asked = self.left_out = self.opened = 0
        self.meters: list[tuple[str, plugins.Meter]] = []  # of plugins, and the checkpoints of their models
        ranks = cfg.distributed_training
        if torch.distributed.is_initialized():  # otherwise they are a user's own way to name a share
            self.rank, self.size = ranks.distributed_rank, ranks.distributed_world_size
            ranks.distributed_rank, ranks.distributed_world_size = 0, 1

    def bar(self, plain_bar: Callable[..., Any], batches: Any, **kwargs: Any) -> Any:
        """fairseq's progress bar over what this rank goes through.

        Raises:
            UserError: there is no batch at all.
        """
        if not len(batches):
            raise UserError(
                "there is nothing to evaluate: the set that --gen-subset or --valid-subset names has no"
                " sentence that the model can take"
            )
        if self.rank:
            kwargs["log_format"] = "none"
        return plain_bar(Share(self, batches), **kwargs)

    def compute(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `step` gives for the batch whose turn it is, on the rank that has it."""
        import torch
        from fairseq import utils

        owner = self.batch % self.size
        if self.rank == 0 and owner:
            received = [None]
            torch.distributed.recv_object_list(received, src=owner)
            return utils.move_to_cuda(received[0]) if self.on_gpu else received[0]
        with contextlib.ExitStack() as counting:
            for _, meter in self.meters if owner == self.rank else ():
                counting.enter_context(meter)
            found = step(*args, **kwargs)
        if self.rank and owner == self.rank:
            torch.distributed.send_object_list([utils.apply_to_sample(lambda t: t.cpu(), found)], dst=0)
        return found

    def watch(self, task: Any) -> None:
        """Count what a task leaves out as too long."""
        plain_filter = task.filter_indices_by_size

        def filter_indices_by_size(indices: Any, *args: Any, **kwargs: Any) -> Any:
            kept = plain_filter(indices, *args, **kwargs)
            self.asked += len(indices)
            self.left_out += len(indices) - len(kept)
            return kept

        task.filter_indices_by_size = filter_indices_by_size

    def open(
        self, plain: Callable[..., Any], filenames: list[str], arg_overrides: Any = None, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """fairseq's load_model_ensemble_and_task; what the models compute is counted."""
        loaded, asked = plain(filenames, arg_overrides, *args, **kwargs), asked_for(arg_overrides or {})
        self.opened += len(filenames)
        for model, file in zip(loaded[0], filenames, strict=True):
            made = [make(model, file, asked) for make in plugins.meters]
            self.meters += [(file, meter) for meter in made if meter]
        return loaded

    def say_what_was_left_out(self) -> None:
        if self.rank == 0 and self.left_out:
            problem = "are longer than the model takes, and were left out of the score"
            say(f"{self.left_out} of {self.asked} sentences or blocks {problem}")

    def say_what_was_computed(self) -> None:
        for file, meter in self.meters:
            line = meter.line()
            if self.rank == 0:
                say(line if self.opened == 1 else f"{file}: {line}")

    @contextlib.contextmanager
    def printing_once(self) -> Iterator[None]:
        if self.rank == 0:
            yield
            return
        logging.disable(logging.WARNING)
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                yield
        finally:
            logging.disable(logging.NOTSET)


def say(line: str) -> None:
    """To stderr: scripts parse what is in stdout."""
    sys.stdout.flush()  # where both are one file, the line would be in the midst of another
    print(line, file=sys.stderr)


class Share:
    """The batches that one rank goes through. Where there are none for a rank, the first: a command divides
    by what it has seen."""

    def __init__(self, turns: Turns, batches: Any) -> None:
        self.turns, self.batches = turns, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        rank, size = self.turns.rank, self.turns.size
        for number, batch in enumerate(self.batches):
            if rank == 0 or number % size == rank or (number == 0 and len(self) <= rank):
                self.turns.batch = number
                yield batch


# What stands in for names of a command's module while it runs.
Names = dict[str, Any]


def share_out(module: Any, prepare: Callable[[Turns, Any], Names]) -> None:
    """Have the ranks share out the batches of a command; `prepare` sees to what computes one."""

    @wrap(module, "main")
    def main(plain: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        cfg = configuration(cfg)
        turns, utils = Turns(cfg), module.checkpoint_utils
        names = prepare(turns, cfg)
        if hasattr(module, "progress_bar"):
            bar = functools.partial(turns.bar, module.progress_bar.progress_bar)
            names["progress_bar"] = stand_in(module.progress_bar, progress_bar=bar)
        opened = functools.partial(turns.open, utils.load_model_ensemble_and_task)
        seen = replaced(utils, load_model_ensemble_and_task=opened)
        with turns.printing_once(), seen, replaced(module, **names):
            result = plain(cfg, *args, **kwargs)
        turns.say_what_was_left_out()
        turns.say_what_was_computed()
        return result


def with_each_task(tasks: Any, see_to: Callable[[Any], None]) -> Any:
    """fairseq.tasks, whose new tasks are seen to."""

    def setup_task(*args: Any, **kwargs: Any) -> Any:
        task = tasks.setup_task(*args, **kwargs)
        see_to(task)
        return task

    return stand_in(tasks, setup_task=setup_task)
