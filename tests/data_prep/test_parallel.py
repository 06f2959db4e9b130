"""parallel.py and digests.py: order, bounds, failures."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prep_scripts import PREP

IN_ORDER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(PREP)!r})
from parallel import in_order
from textio import run
"""


def python(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", IN_ORDER + body], capture_output=True, text=True, timeout=60)


def test_results_are_in_order_and_few_items_wait() -> None:
    done = python("""
taken = 0
def items():
    global taken
    for taken in range(200):
        yield taken
def work(item):
    time.sleep(0.002 * (item % 3))
    return item
for number, result in enumerate(in_order(work, items(), 3)):
    assert result == number and taken - number <= 7, (number, result, taken)
print("done", taken)
""")
    assert done.stdout == "done 199\n", done.stderr


def test_a_killed_process_is_one_line() -> None:
    done = python("""
run(lambda: list(in_order(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(9), 2)))
""")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "one of 2 processes was killed; out of memory?" in done.stderr


def test_workers_do_not_outlive_a_killed_parent() -> None:
    program = (
        IN_ORDER
        + """
def work(item):
    os.write(1, b"%d\\n" % os.getpid())  # one write, which another worker's cannot split
    time.sleep(600)
list(in_order(work, range(2), 2))
"""
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGKILL)
        end = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(alive, workers))


def alive(process: int) -> bool:
    """A zombie is dead: it waits for whoever adopted it, which in a container may be nobody."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_repeats_are_found_wherever_they_are(tmp_path: Path, size: int) -> None:
    body = f"""
import random
from pathlib import Path
from digests import DigestLog, copy_first
rng = random.Random(3)
edges = [0, 2**64 - 1]
values = [*edges, *(rng.choice((rng.randrange(2**64), rng.randrange(5))) for _ in range(3000)), *edges]
log = DigestLog(Path({str(tmp_path / "log")!r}))
for start in range(0, len(values), {size}):
    log.add(values[start : start + {size}])
bits = log.repeated()
seen = set()
for number, value in enumerate(values):
    assert bool(bits[number >> 3] >> (number & 7) & 1) == (value in seen), number
    seen.add(value)
print(len(values) - len(seen))
"""
    done = python(body)
    assert int(done.stdout) > 1000, done.stderr
