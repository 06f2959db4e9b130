"""What single commands of fairseq need."""

from __future__ import annotations

import itertools
import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.registry import has, mend, stand_in


@mend("fairseq_cli.generate")
def generate_on_several_ranks(module: Any) -> None:
    """Every torch: under torchrun fairseq-generate joins no ranks, so each of them translates everything.

    Each takes its share, and with --results-path writes into a folder of its own there (rank0, rank1, ...).
    """
    plain_main = module.main

    def shared_out(cfg: Any) -> Any:
        rank, results = cfg.distributed_training.distributed_rank, cfg.common_eval.results_path
        if results is not None:
            cfg.common_eval.results_path = os.path.join(results, f"rank{rank}")
        return plain_main(cfg)

    def main(cfg: Any) -> Any:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return plain_main(cfg)
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.distributed import utils

        cfg = convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg
        return utils.call_main(cfg, shared_out)

    module.main = main


def equal_lines(system: Any, reference: Any) -> Iterator[tuple[Any, Any]]:
    """Lines of --sys and --ref, which must have as many."""
    for number, pair in enumerate(itertools.zip_longest(system, reference)):
        if None in pair:
            short, long = ("--sys", "--ref") if pair[0] is None else ("--ref", "--sys")
            raise UserError(f"{short} ends after line {number}, {long} does not; give as many lines")
        yield pair


@mend("fairseq_cli.score")
def score_all_lines(module: Any) -> None:
    """Every torch: fairseq-score passes over the lines that one of its two files has more."""
    module.zip = equal_lines


@mend("fairseq_cli.score", when=lambda: has("sacrebleu", 2))
def score_with_sacrebleu_2(module: Any) -> None:
    """fairseq-score --sacrebleu hands over open files, where sacrebleu >= 2 wants lists of lines.

    sacrebleu too passes over lines that only one of them has.
    """
    import sacrebleu

    plain_bleu = sacrebleu.corpus_bleu

    def corpus_bleu(system: Any, references: Any) -> Any:
        hypotheses, lines = zip(*equal_lines(system, references[0]), strict=True)
        return plain_bleu(hypotheses, [lines])

    sacrebleu.corpus_bleu = corpus_bleu


@mend("fairseq_cli.score")
def score_sentences(module: Any) -> None:
    """Every torch: fairseq-score --sentence-bleu makes its scorer of three numbers, not of one config."""
    from fairseq.scoring import bleu

    def scorer(*args: Any) -> Any:
        return bleu.Scorer(*args) if len(args) == 1 else bleu.Scorer(bleu.BleuConfig(*args))

    module.bleu = stand_in(bleu, Scorer=scorer)


@mend("fairseq_cli.validate")
def validate_on_several_ranks(module: Any) -> None:
    """Every torch: a rank that runs out of batches before the others validates an empty one, and fails."""
    checkpoint_utils = module.checkpoint_utils

    def load_model_ensemble_and_task(*args: Any, **kwargs: Any) -> Any:
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(*args, **kwargs)
        plain_step = task.valid_step

        def valid_step(sample: Any, *args: Any, **kwargs: Any) -> Any:
            return plain_step(sample, *args, **kwargs) if sample else (0, 0, {})

        task.valid_step = valid_step
        return models, cfg, task

    module.checkpoint_utils = stand_in(
        checkpoint_utils, load_model_ensemble_and_task=load_model_ensemble_and_task
    )
