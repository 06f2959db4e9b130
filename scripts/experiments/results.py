"""Reads text, JSON and what fairseq logged, and writes tables: shared by the commands and the benchmarks."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.files import write_atomically


def read(path: Path) -> str:
    """Raises UserError, or OSError with the path."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8: {error.reason} at byte {error.start}") from None


def lines(path: Path) -> list[str]:
    """Text, a sentence a line. Not str.splitlines, which also splits at characters inside a sentence."""
    return read(path).removesuffix("\n").split("\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is no JSON: {error}") from None


def read_run(run: Path) -> dict[str, Any]:
    """What train.py has noted of a run. Raises UserError, or OSError with the path."""
    about = read_json(run / "run.json")
    expected = ("task", "preset", "model", "data", "seed", "flags")
    if not isinstance(about, dict) or not about.keys() >= {*expected}:
        raise UserError(f"{run / 'run.json'}: must have {', '.join(expected)}, as train.sh writes them")
    return about


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
        raise UserError(f"{log}: no record of {group}; was the command cut short?")
    return found[-1]


def median_seconds(log: Path) -> float:
    """Of an update; the median, so that a pause or another job counts little. NaN: none is logged."""
    for group in ("train_inner", "train"):  # the latter at the end of an epoch, be it one of few updates
        if seconds := [1 / one["ups"] for one in records(log, group) if one.get("ups", 0) > 0]:
            return float(statistics.median(seconds))
    return math.nan


def parameters(log: Path) -> int:
    """fairseq counts the experts of expert parallelism apart, and those of one rank only."""
    numbers = re.findall(r"num\. (?:shared|expert) model params: ([\d,]+)", read(log))[:2]
    return sum(int(number.replace(",", "")) for number in numbers)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """With ± and the standard deviation where there are several values that differ."""
    mean = statistics.mean(values)
    if math.isnan(mean):
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:,.{digits}f}" + (f" ± {deviation:,.{digits}f}" if deviation else "")


def check_output(output: Path, *inputs: Path) -> None:
    """Raises UserError if the output is one of the inputs, by this name or another."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise UserError(f"{output}: is the input {path}, which would be overwritten; name another output")


def check_ending(flag: str, path: Path, ending: str) -> None:
    """Raises FlagError."""
    if path.suffix != ending:
        raise FlagError(f"{flag} must end in {ending}, got {path}")


def write_json(path: Path, content: Any) -> None:
    """Dataclasses too."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, default=asdict) + "\n")


def publish(path: Path, text: str, content: Any) -> None:
    """Prints a table, and writes it as `path`.md and what it was made from as `path`.json."""
    print(text, end="")
    write_atomically(path.with_suffix(".md"), text)
    write_json(path.with_suffix(".json"), content)
