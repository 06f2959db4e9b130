"""Reads what fairseq logged, scores translations, writes tables: shared by the reports."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from xmoe_fairseq.tables import markdown as markdown

METRICS = {"bleu": BLEU(), "chrf": CHRF(), "chrf++": CHRF(word_order=2)}


class ResultError(Exception):
    """A file that is missing or cut short; one line."""


def lines(path: Path) -> list[str]:
    """Text, a sentence a line. Not str.splitlines, which also splits at characters inside a sentence."""
    return read(path).removesuffix("\n").split("\n")


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None


def hypotheses(path: Path) -> list[str]:
    """fairseq-generate prints sentences by length; D-<number> gives their place back."""
    found = re.findall(r"^D-(\d+)\t\S+\t(.*)$", read(path), re.M)
    return [text for _, text in sorted((int(number), text) for number, text in found)]


def score(
    hypothesis: list[str], reference: list[str], metrics: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of a translation, and the signatures that say how they were computed."""
    if len(hypothesis) != len(reference):
        raise ResultError(f"{len(hypothesis)} translations of {len(reference)}: the evaluation was cut short")
    scores = {name: METRICS[name].corpus_score(hypothesis, [reference]).score for name in metrics}
    return scores, {name: str(METRICS[name].get_signature()) for name in metrics}


def records(log: Path, group: str) -> list[dict[str, Any]]:
    """The JSON records of a group that fairseq logged, numbers as numbers, keys without the group."""
    found = re.findall(rf"\| {group} \| (\{{.*\}})", read(log))
    return [
        {key.removeprefix(f"{group}_"): _number(value) for key, value in json.loads(one).items()}
        for one in found
    ]


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def record(log: Path, group: str) -> dict[str, Any]:
    """The last one."""
    found = records(log, group)
    if not found:
        raise ResultError(f"{log}: no record of {group}; was the command cut short?")
    return found[-1]


def seconds_per_update(log: Path) -> float:
    """Median, so that a pause or another job on the machine counts little."""
    rates = [one["ups"] for one in records(log, "train_inner")]
    seconds = [1 / rate for rate in rates if rate > 0]
    if not seconds:
        raise ResultError(f"{log}: no training speed; was training cut short?")
    return statistics.median(seconds)


def routing(stats: dict[str, Any], side: str) -> tuple[float, float]:
    """Experts per token, and MoE FLOPs over the dense FFN's; a dense model has none, and 1."""
    experts = stats.get(f"moe_{side}_experts_per_token", math.nan)
    return experts, stats.get(f"moe_{side}_flops_vs_dense_ffn", 1.0)


def check_output(output: Path, *inputs: Path) -> None:
    """Raises ResultError if the output is one of the inputs, by this name or another."""
    for path in inputs:
        if output.resolve() == path.resolve() or (
            output.exists() and path.exists() and output.samefile(path)
        ):
            raise ResultError(
                f"{output}: is the input {path}, which would be overwritten; name another output"
            )


def write(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    partial.rename(path)


def write_json(path: Path, content: Any) -> None:
    write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
