"""Evaluates checkpoints by the stock commands, and scores what they print."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF

from experiments import processes
from experiments.results import lines, read
from experiments.train import BIN
from xmoe_fairseq_compat.errors import UserError

METRICS = {"bleu": BLEU(), "chrf": CHRF(), "chrf++": CHRF(word_order=2)}


def call(words: Sequence[object], log: Path) -> Path:
    """Runs a command of this environment, or another; its log, which begins with the command."""
    tool, *rest = map(str, words)
    command = [str(BIN / tool), *rest]
    print(f"[score] {shlex.join(command)}", flush=True)
    partial = log.with_name(log.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        print(shlex.join(command), file=file, flush=True)
        status = processes.run(command, stdout=file, stderr=file)
    if status:
        raise UserError(f"{tool} failed: {lines(partial)[-1]} (all of it: {partial})")
    return partial.replace(log)


def hypotheses(path: Path) -> list[str]:
    """fairseq-generate prints sentences by length; D-<number> gives their place back."""
    found = re.findall(r"^D-(\d+)\t\S+\t(.*)$", read(path), re.M)
    return [text for _, text in sorted((int(number), text) for number, text in found)]


def score(
    hypothesis: list[str], reference: list[str], metrics: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of a translation, and the signatures that say how they were computed."""
    if len(hypothesis) != len(reference):
        raise UserError(f"{len(hypothesis)} translations of {len(reference)}: the evaluation was cut short")
    scores = {name: METRICS[name].corpus_score(hypothesis, [reference]).score for name in metrics}
    return scores, {name: str(METRICS[name].get_signature()) for name in metrics}


def last_number(path: Path, before: str) -> float:
    """The last number that a command printed after these words.

    Raises:
        UserError: there is none, or nothing was evaluated.
    """
    printed = read(path)
    found = re.findall(rf"{re.escape(before)} (\d[\d.,]*)", printed)
    if not found or "Evaluated 0 tokens" in printed:
        raise UserError(f"{path}: nothing was evaluated; is the context longer than the model's?")
    return float(found[-1].replace(",", ""))
