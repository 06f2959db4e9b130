"""Progress bars over trainings of train.py that run in the background.

    python scripts/run.py experiments.watch translation:RUN:PID ...

Each argument is NAME:RUN:PID of a train.py. Ends when all of them have ended; whether they succeeded is for
the caller's `wait` to say.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

RECORD = re.compile(r"\| train_inner \| (\{.*\})")
PLAIN_INTERVAL = 30  # seconds between lines where there is no terminal


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # an ended child of the calling shell stays as a zombie until its `wait`
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[-1].split()[0] == "Z")


def total(run: Path) -> int | None:
    """Updates that the run is to have; None where it has not begun, or counts epochs."""
    about = run / "run.json"
    command = json.loads(about.read_text())["command"] if about.exists() else []
    return int(command[command.index("--max-update") + 1]) if "--max-update" in command else None


def latest(log: Path) -> tuple[int, str]:
    """Number of updates done and the training perplexity of the last record."""
    if not log.exists():
        return 0, ""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 8192, 0))
        records = RECORD.findall(file.read().decode(errors="replace"))
    if not records:
        return 0, ""
    record = json.loads(records[-1])
    return int(record["num_updates"]), f"perplexity {float(record['ppl']):.1f}"


def main(arguments: list[str]) -> None:
    split = [argument.split(":") for argument in arguments]
    jobs = [(name, Path(run), int(pid)) for name, run, pid in split]
    console = Console()
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    next_line = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = [bars.add_task(name, total=None, note="") for name, *_ in jobs]
        while True:
            alive = any(running(pid) for *_, pid in jobs)
            plain = not console.is_terminal and (time.monotonic() > next_line or not alive)
            if plain:
                next_line = time.monotonic() + PLAIN_INTERVAL
            for task, (name, run, _) in zip(tasks, jobs, strict=True):
                (done, note), updates = latest(run / "train.log"), total(run)
                bars.update(task, completed=done, total=updates, note=note)
                if plain:
                    print(f"  {name}: {done} of {updates or '?'} updates {note}", flush=True)
            if not alive:
                return
            time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1:])
