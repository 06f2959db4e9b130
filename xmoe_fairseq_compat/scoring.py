"""Perplexity: of all the text that was asked for, and per word where words are asked for."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from typing import Any

from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.registry import patch, replaced, wrap
from xmoe_fairseq_compat.settings import configuration
from xmoe_fairseq_compat.shares import with_each_task
from xmoe_fairseq_compat.trained import complete_defaults
from xmoe_fairseq_compat.words import Text, texts_of


def report_words(module: Any, text: Text, probabilities: bool, statistics: bool) -> None:
    """What --output-word-probs and --output-word-stats print."""
    words = text.each_word()
    if probabilities:
        lines: dict[int, list[str]] = {}
        for block, word, score, _ in words:
            lines.setdefault(block, []).append(f"{word} [{score:2f}]")
        for block, line in lines.items():
            module.logger.info("%d %s", block, "\t".join(line))
    if statistics:
        stats: dict[str, Any] = {}
        following = [score for _, _, score, _ in words[1:]] + [None]
        for (_, word, score, several), after in zip(words, following, strict=True):
            stats.setdefault(word, module.WordStat(word, several)).add(score, after)
        for stat in sorted(stats.values(), key=lambda stat: stat.count, reverse=True):
            module.logger.info(stat)


def scores_of(text: Text, tokens: int, unknown: int, logger: logging.Logger) -> dict[str, float]:
    """Loss (base 2) and perplexity per word; those per token are logged, where they are others.

    Args:
        unknown: how many of the tokens are <unk>.
    """
    bits = -float(text.score_T.sum()) / math.log(2)
    if text.words != tokens:
        logger.info(
            f"Per token: loss (base 2) {bits / tokens:.4f}, perplexity {power_of_2(bits / tokens):.2f}."
            f" Below per word: {text.words:,} words, ends of lines among them"
            + (f"; {unknown:,} tokens are <unk>, whose words may be miscounted" if unknown else "")
        )
    loss = bits / text.words
    return {"loss": loss, "perplexity": power_of_2(loss)}


def power_of_2(exponent: float) -> float:
    """inf, not an error, where it is too large."""
    import numpy as np

    return float(np.exp2(exponent))


@patch("fairseq_cli.eval_lm")
def perplexity_per_word(module: Any) -> None:
    """Every torch: --remove-bpe has no effect on fairseq-eval-lm (it compares its own default constant with
    others), so that a perplexity per piece passes for one per word; sentencepiece is not there; a word that a
    block cuts counts twice; --add-bos-token ends in an IndexError; and improbable tokens are left out."""

    def eval_lm(
        models: Any,
        source_dictionary: Any,
        batch_iterator: Any,
        post_process: str | None = None,
        output_word_probs: bool = False,
        output_word_stats: bool = False,
        target_dictionary: Any = None,
        softmax_batch: int = 0,
        remove_bos_token: bool = False,
        device: Any = None,
    ) -> dict[str, float]:
        dictionary = target_dictionary or source_dictionary
        texts = texts_of(dictionary, post_process)
        device = device or next(models[0].parameters()).device
        scorer = module.SequenceScorer(dictionary, softmax_batch)
        timer, blocks, skip = module.StopwatchMeter(), {}, int(remove_bos_token)
        for sample in batch_iterator:
            sample = module.utils.move_to_cuda(sample, device=device)
            timer.start()
            found = [hypotheses[0] for hypotheses in scorer.generate(models, sample)]
            timer.stop(sum(len(hypothesis["tokens"]) - skip for hypothesis in found))
            for block, hypothesis in zip(sample["id"].tolist(), found, strict=True):
                scores = hypothesis["positional_scores"][skip:].double().cpu().numpy()
                blocks[block] = hypothesis["tokens"][skip:].cpu().numpy(), scores
        text = Text(blocks, texts)
        rate = 1 / timer.avg if timer.avg > 0 else 0
        module.logger.info(f"Evaluated {timer.n:,} tokens in {timer.sum:.1f}s ({rate:.2f} tokens/s)")
        if output_word_probs or output_word_stats:
            report_words(module, text, output_word_probs, output_word_stats)
        return scores_of(text, timer.n, int((text.token_T == dictionary.unk()).sum()), module.logger)

    module.eval_lm = eval_lm


@patch("fairseq_cli.eval_lm")
def score_every_block(module: Any) -> None:
    """Every torch: fairseq-eval-lm leaves out the blocks that are longer than the model takes, whatever
    --skip-invalid-size-inputs-valid-test says, and scores the rest."""

    @wrap(module, "main")
    def main(plain: Any, cfg: Any, **kwargs: Any) -> Any:
        if isinstance(cfg, Namespace):  # of a script that parses flags itself
            cfg = configuration(cfg)
            complete_defaults(cfg)

        def see_to(task: Any) -> None:
            plain_loader = task.eval_lm_dataloader

            def eval_lm_dataloader(dataset: Any, max_positions: int, **kwargs: Any) -> Any:
                context = cfg.eval_lm.context_window
                if not cfg.dataset.skip_invalid_size_inputs_valid_test:
                    refuse_long_blocks(dataset, max_positions, context, task.args.tokens_per_sample + context)
                return plain_loader(dataset=dataset, max_positions=max_positions, **kwargs)

            task.eval_lm_dataloader = eval_lm_dataloader

        with replaced(module, tasks=with_each_task(module.tasks, see_to)):
            return plain(cfg, **kwargs)


def refuse_long_blocks(dataset: Any, positions: int | None, context: int, most: int) -> None:
    """Raises FlagError if the model would read more than its `positions` at once.

    Args:
        context: tokens read before each block, if together they are at most `most`.
    """
    import numpy as np

    sizes = np.asarray(dataset.sizes)
    read = np.maximum(sizes, np.minimum(sizes + context, most))
    if positions is not None and (read > positions).any():
        raise FlagError(
            f"--tokens-per-sample must be at most the model's {positions} positions:"
            f" {(read > positions).sum()} of {len(read)} blocks have more, up to {read.max()}; give fewer, or"
            " leave these out with --skip-invalid-size-inputs-valid-test"
        )
