"""Evaluates checkpoints by the stock commands, and scores what they print."""

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF

from experiments.plan import LENGTHS
from experiments.results import lines, read
from experiments.train import BIN, ROOT
from xmoe_fairseq_compat.errors import UserError

METRICS = {"bleu": BLEU(), "chrf": CHRF(), "chrf++": CHRF(word_order=2)}


def call(words: Sequence[object], log: Path, *, made_from: Path | None = None) -> Path:
    """Runs a command of this environment, or another; its log, which begins with the command.

    Args:
        made_from: not again if the same command has run since this file was written.
    """
    tool, *rest = map(str, words)
    command = shlex.join([str(BIN / tool), *rest])
    if (
        made_from
        and log.exists()
        and log.stat().st_mtime >= made_from.stat().st_mtime
        and lines(log)[0] == command
    ):
        return log
    print(f"[score] {command}", flush=True)
    partial = log.with_name(log.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        print(command, file=file, flush=True)
        status = subprocess.run(shlex.split(command), stdout=file, stderr=subprocess.STDOUT).returncode
    if status:
        raise UserError(f"{tool} failed: {lines(partial)[-1]} (all of it: {partial})")
    return partial.replace(log)


def of_checkpoint(tool: str, data: Path, checkpoint: Path) -> list[object]:
    """A stock command on a folder of data-prep, to be continued."""
    where = ("--user-dir", ROOT / "xmoe_fairseq", "--path", checkpoint)
    return [tool, data / "bin", *where, "--num-workers", 0]


def search(beam: int) -> list[object]:
    """Flags of fairseq-generate, for detokenised text."""
    lengths = [word for name, value in LENGTHS.items() for word in ("--" + name.replace("_", "-"), value)]
    return ["--beam", beam, "--remove-bpe", "sentencepiece", *lengths]


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
