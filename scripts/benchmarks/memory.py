"""The memory that a function takes at its peak (Linux)."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch

Make = Callable[[], Callable[[], None]]


def peak_memory(make: Make) -> float:
    """MB that one call of what is made adds to this process at its peak."""
    torch.manual_seed(1)
    run = make()
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    before = _mark("VmRSS")
    run()
    return _mark("VmHWM") - before


def peak_memory_anew(make: Make) -> float:
    """In a process of its own, which gives memory back as a process does by default."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, (make,))


def _mark(name: str) -> float:
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(name))
    return int(line.split()[1]) / 1000
