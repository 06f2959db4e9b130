"""What single commands of fairseq need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.registry import has, mend, stand_in


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
