"""Evaluation on several ranks: they share out the batches, and rank 0 prints what one process would."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.registry import mend, stand_in


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
        found = step(*args, **kwargs)
        if self.rank and owner == self.rank:
            torch.distributed.send_object_list([utils.apply_to_sample(lambda t: t.cpu(), found)], dst=0)
        return found

    @contextlib.contextmanager
    def printing_once(self) -> Iterator[None]:
        if self.rank == 0:
            yield
            return
        logging.disable(logging.WARNING)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
        logging.disable(logging.NOTSET)


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


def shared(module: Any, prepare: Callable[[Turns, Any], None]) -> Callable[..., Any]:
    """A command's main whose batches the ranks share out; `prepare` sees to what computes one."""
    plain_main, progress = module.main, module.progress_bar

    @functools.wraps(plain_main)
    def main(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf

        cfg = convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg
        turns = Turns(cfg)
        bar = functools.partial(turns.bar, progress.progress_bar)
        module.progress_bar = stand_in(progress, progress_bar=bar)
        prepare(turns, cfg)
        with turns.printing_once():
            return plain_main(cfg, *args, **kwargs)

    return main


@mend("fairseq_cli.generate")
def generate_on_several_ranks(module: Any) -> None:
    """Every torch: under torchrun fairseq-generate joins no ranks, so each translates everything; those that
    are joined score their shares, and print as many results."""
    tasks = module.tasks

    def prepare(turns: Turns, cfg: Any) -> None:
        def setup_task(*args: Any, **kwargs: Any) -> Any:
            task = tasks.setup_task(*args, **kwargs)
            task.inference_step = functools.partial(turns.compute, task.inference_step)
            return task

        module.tasks = stand_in(tasks, setup_task=setup_task)
        if turns.size > 1:
            logging.root.handlers.clear()  # those of joining the ranks; main chooses where to write
        if turns.rank:
            cfg.common_eval.results_path = None

    shared_main = shared(module, prepare)

    @functools.wraps(shared_main)
    def main(cfg: Any) -> Any:
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.distributed import utils

        cfg = convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        return shared_main(cfg) if alone else utils.call_main(cfg, shared_main)

    module.main = main


@mend("fairseq_cli.eval_lm")
def score_on_several_ranks(module: Any) -> None:
    """Every torch: each rank prints its share's perplexity as the perplexity, and with a context window
    takes for context what came before in its share. So does each of several --num-workers."""
    plain_scorer = module.SequenceScorer

    def prepare(turns: Turns, cfg: Any) -> None:
        class SequenceScorer(plain_scorer):  # type: ignore[misc, valid-type]
            def generate(self, models: Any, sample: Any, **kwargs: Any) -> Any:
                return turns.compute(super().generate, models, sample, **kwargs)

        module.SequenceScorer = SequenceScorer
        if cfg.eval_lm.context_window > 0:
            cfg.dataset.num_workers = min(1, cfg.dataset.num_workers)

    module.main = shared(module, prepare)


@mend("fairseq_cli.validate")
def validate_on_several_ranks(module: Any) -> None:
    """Every torch: a rank that runs out of batches before the others validates an empty one, and fails; and
    on a GPU, what they log must fit into 16 KB."""
    checkpoint_utils = module.checkpoint_utils

    def prepare(turns: Turns, cfg: Any) -> None:
        def load_model_ensemble_and_task(*args: Any, **kwargs: Any) -> Any:
            models, saved, task = checkpoint_utils.load_model_ensemble_and_task(*args, **kwargs)
            task.valid_step = functools.partial(turns.compute, task.valid_step)
            return models, saved, task

        module.checkpoint_utils = stand_in(
            checkpoint_utils, load_model_ensemble_and_task=load_model_ensemble_and_task
        )

    module.main = shared(module, prepare)
