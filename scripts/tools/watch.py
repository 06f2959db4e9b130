"""Progress bars over the logs of trainings that run in the background.

    python scripts/tools/watch.py translation:run/train.log:1800:PID ...

Each argument is NAME:LOG:UPDATES:PID of a fairseq-train that writes `--log-format json` into LOG. Ends when
all of them have ended; whether they succeeded is for the caller's `wait` to say.
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
    jobs = [(name, Path(log), int(total), int(pid)) for name, log, total, pid in split]
    console = Console()
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    next_line = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = [bars.add_task(name, total=total, note="") for name, _, total, _ in jobs]
        while True:
            alive = any(running(pid) for *_, pid in jobs)
            states = [latest(log) for _, log, _, _ in jobs]
            for task, (done, note) in zip(tasks, states, strict=True):
                bars.update(task, completed=done, note=note)
            if not console.is_terminal and (time.monotonic() > next_line or not alive):
                next_line = time.monotonic() + PLAIN_INTERVAL
                for (name, _, total, _), (done, note) in zip(jobs, states, strict=True):
                    print(f"  {name}: {done} of {total} updates {note}", flush=True)
            if not alive:
                return
            time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1:])
