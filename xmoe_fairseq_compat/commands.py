"""What single commands of fairseq need."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.folders import check_language_model
from xmoe_fairseq_compat.registry import has, patch, stand_in, wrap
from xmoe_fairseq_compat.settings import configuration
from xmoe_fairseq_compat.shares import Names, Turns, share_out, with_each_task
from xmoe_fairseq_compat.splits import load_with_targets


def equal_lines(system: Any, reference: Any) -> Iterator[tuple[Any, Any]]:
    """Lines of --sys and --ref, which must have as many, and one at least."""
    number = -1
    for number, pair in enumerate(itertools.zip_longest(system, reference)):
        if None in pair:
            short, long = ("--sys", "--ref") if pair[0] is None else ("--ref", "--sys")
            raise UserError(f"{short} ends after line {number}, {long} does not; give as many lines")
        yield pair
    if number < 0:
        raise UserError("--sys and --ref are empty: there is nothing to score")


@patch("fairseq_cli.score")
def score_all_lines(module: Any) -> None:
    """Every torch: fairseq-score passes over the lines that one of its two files has more; a file that is
    missing or empty ends in a traceback."""
    module.zip = equal_lines

    @wrap(module, "cli_main")
    def cli_main(plain: Any) -> None:
        try:
            plain()
        except AssertionError as error:
            if "does not exist" not in str(error):
                raise
            raise UserError(str(error)) from error


@patch("fairseq_cli.score", when=lambda: has("sacrebleu", 2))
def score_with_sacrebleu_2(module: Any) -> None:
    """fairseq-score --sacrebleu hands over open files, where sacrebleu >= 2 wants lists of lines.

    sacrebleu too passes over lines that only one of them has.
    """
    import sacrebleu

    @wrap(sacrebleu, "corpus_bleu")
    def corpus_bleu(plain: Any, system: Any, references: Any) -> Any:
        hypotheses, lines = zip(*equal_lines(system, references[0]), strict=True)
        return plain(hypotheses, [lines])


@patch("fairseq_cli.score")
def score_sentences(module: Any) -> None:
    """Every torch: fairseq-score --sentence-bleu makes its scorer of three numbers, not of one config."""
    from fairseq.scoring import bleu

    def scorer(*args: Any) -> Any:
        return bleu.Scorer(*args) if len(args) == 1 else bleu.Scorer(bleu.BleuConfig(*args))

    module.bleu = stand_in(bleu, Scorer=scorer)


def refuse_shards(cfg: Any) -> None:
    """Raises FlagError for what fairseq-generate and fairseq-validate pass over."""
    if cfg.dataset.num_shards > 1:
        raise FlagError("--num-shards must be 1 here: it has no effect; run the command under torchrun")


def checked_language_model(utils: Any, dictionaries: list[Any]) -> Any:
    """fairseq's checkpoint_utils; the model of --lm-path, which has its own task, must fit a dictionary."""

    def load_model_ensemble(filenames: list[str], *args: Any, task: Any = None, **kwargs: Any) -> Any:
        models, saved = utils.load_model_ensemble(filenames, *args, task=task, **kwargs)
        if task is None:
            check_language_model(models[0], filenames[0], dictionaries[0])
        return models, saved

    return stand_in(utils, load_model_ensemble=load_model_ensemble)


@patch("fairseq_cli.generate")
def generate_on_several_ranks(module: Any) -> None:
    """Every torch: under torchrun fairseq-generate joins no ranks, so each translates everything; those that
    are joined score their shares, and print as many results."""

    def prepare(turns: Turns, cfg: Any) -> Names:
        dictionaries: list[Any] = []

        def see_to(task: Any) -> None:
            turns.watch(task)
            dictionaries.append(task.target_dictionary)
            task.inference_step = functools.partial(turns.compute, task.inference_step)

        refuse_shards(cfg)
        if turns.size > 1:
            logging.root.handlers.clear()  # those of joining the ranks; main chooses where to write
        if turns.rank:
            cfg.common_eval.results_path = None
        utils = checked_language_model(module.checkpoint_utils, dictionaries)
        return {"tasks": with_each_task(module.tasks, see_to), "checkpoint_utils": utils}

    share_out(module, prepare)

    @wrap(module, "main")
    def main(plain: Any, cfg: Any) -> Any:
        from fairseq.distributed import utils

        cfg = configuration(cfg)
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        return plain(cfg) if alone else utils.call_main(cfg, plain)


@patch("fairseq_cli.eval_lm")
def score_on_several_ranks(module: Any) -> None:
    """Every torch: each rank prints its share's perplexity as the perplexity, and with a context window
    takes for context what came before in its share. So does each of several --num-workers."""
    plain_scorer = module.SequenceScorer

    def prepare(turns: Turns, cfg: Any) -> Names:
        class SequenceScorer(plain_scorer):  # type: ignore[misc, valid-type]
            def generate(self, models: Any, sample: Any, **kwargs: Any) -> Any:
                return turns.compute(super().generate, models, sample, **kwargs)

        if cfg.eval_lm.context_window > 0:
            cfg.dataset.num_workers = min(1, cfg.dataset.num_workers)
        return {"SequenceScorer": SequenceScorer, "tasks": with_each_task(module.tasks, turns.watch)}

    share_out(module, prepare)


@patch("fairseq_cli.validate")
def validate_on_several_ranks(module: Any) -> None:
    """Every torch: a rank that runs out of batches before the others validates an empty one, and fails; and
    on a GPU, what they log must fit into 16 KB."""

    def prepare(turns: Turns, cfg: Any) -> Names:
        utils = module.checkpoint_utils
        refuse_shards(cfg)

        def load_model_ensemble_and_task(*args: Any, **kwargs: Any) -> Any:
            models, saved, task = utils.load_model_ensemble_and_task(*args, **kwargs)
            turns.watch(task)
            task.valid_step = functools.partial(turns.compute, task.valid_step)
            task.load_dataset = functools.partial(load_with_targets, task, task.load_dataset)
            return models, saved, task

        return {
            "checkpoint_utils": stand_in(utils, load_model_ensemble_and_task=load_model_ensemble_and_task)
        }

    share_out(module, prepare)


@patch("fairseq_cli.interactive")
def know_the_models_of_interactive(module: Any) -> None:
    """Every torch: no plugin can say what was computed, as after the other commands; and several ranks would
    each print all translations."""

    def prepare(turns: Turns, cfg: Any) -> Names:
        def see_to(task: Any) -> None:
            task.inference_step = functools.partial(turns.compute, task.inference_step)

        return {"tasks": with_each_task(module.tasks, see_to)}

    share_out(module, prepare)
