"""Times several functions in turn, so that a drift of the machine's speed meets all of them alike."""

import os
import platform
import re
import statistics
import time
import warnings
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 2  # rounds


def at_least_two(text: str) -> int:
    if int(text) < 2:
        raise ArgumentTypeError(f"must be at least 2, for quartiles, got {text}")
    return int(text)


def add_rounds(parser: ArgumentParser, default: int) -> None:
    parser.add_argument("--rounds", type=at_least_two, default=default, help=f"counted (default: {default})")


def add_common(parser: ArgumentParser, name: str, rounds: int) -> None:
    add_rounds(parser, rounds)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(f"runs/benchmark_{name}"), help="folder")


@dataclass(frozen=True)
class Timing:
    milliseconds: float  # median
    ratio: float  # median of the ratios to the first function, round by round
    low: float  # quartiles of these ratios
    high: float

    def __str__(self) -> str:
        return f"{self.milliseconds:.1f} ms, {self.ratio:.2f} x ({self.low:.2f} to {self.high:.2f})"


def in_turn(
    functions: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1, warm_up: int = WARM_UP
) -> dict[str, Timing]:
    """Each function's time, and its ratio to the first one's.

    Args:
        calls: of a function in each of its turns; a GPU may fall behind the host within a turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(warm_up + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            finish_device()
            if round_number >= warm_up:
                seconds[name].append((time.perf_counter() - start) / calls)
    first = next(iter(seconds.values()))
    return {name: _summary(times, first) for name, times in seconds.items()}


def _summary(times: list[float], first: list[float]) -> Timing:
    ratios = [mine / base for mine, base in zip(times, first, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Timing(1000 * statistics.median(times), middle, low, high)


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """Collects a text for each time that the host waits for the GPU inside the `with` block, as torch's debug
    mode for that sees it."""
    waited: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield waited
    finally:
        torch.cuda.set_sync_debug_mode(before)
    texts = [str(warning.message) for warning in caught]
    waited += [text for text in texts if "called a synchronizing" in text]


def finish_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forward(function: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            function()

    return run


def forward_backward(
    function: Callable[[], Tensor], leaves: Iterable[Tensor], grad_y: Tensor
) -> Callable[[], None]:
    """Gradients are new in every round, as after an optimizer's zero_grad."""
    leaves = list(leaves)

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        function().backward(grad_y)

    return run


def leaves_of(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [x, *module.parameters()]


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    model = named[1] if named else platform.processor()
    return {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else model,
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
