"""A check, and what came of it."""

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
Case = argparse.Namespace  # device, only, updates, out, work, facts: see check.main


class Found(NamedTuple):
    """What a check that passed has to say, and the numbers for a report."""

    note: str
    numbers: dict[str, Any] = {}


class Check(NamedTuple):
    name: str  # "group what"
    run: Callable[[], Found]  # raises Skip, Failed, or whatever is wrong


class Skip(Exception):
    """A check cannot run here; one line says why."""


class Failed(Exception):
    """One line says what should have been, and what was."""

    def __init__(self, text: str, numbers: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.numbers = numbers or {}


@dataclass
class Outcome:
    name: str
    result: str
    note: str
    seconds: float
    numbers: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.result} {self.name}: {self.note} ({self.seconds:.1f} s)"


def is_wanted(case: Case, name: str) -> bool:
    """Each of --only is the first words of a name."""
    return not case.only or any(f"{name} ".startswith(f"{each} ") for each in case.only)


def outcome_of(check: Check) -> Outcome:
    """Whatever a check raises is its failure, and the others go on."""
    start, trace = time.perf_counter(), ""
    numbers: dict[str, Any] = {}
    try:
        result, (note, numbers) = PASS, check.run()
    except Skip as reason:
        result, note = SKIP, str(reason)
    except Failed as failure:
        result, note, numbers = FAIL, str(failure), failure.numbers
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        result, note, trace = FAIL, f"{type(error).__name__}: {first}", traceback.format_exc()
    return Outcome(check.name, result, note, time.perf_counter() - start, numbers, trace)
