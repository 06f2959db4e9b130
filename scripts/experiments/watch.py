"""Progress bars over trainings of train.py that run in the background.

    python scripts/run.py experiments.watch translation:RUN:PID ...

Each argument is NAME:RUN:PID of a train.py. Ends when all of them have ended; whether they succeeded is for
the caller's `wait` to say.
"""

import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.results import read_json, records

PLAIN_INTERVAL = 30  # seconds between lines where there is no terminal


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # an ended child of the calling shell stays as a zombie until its `wait`
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[-1].split()[0] == "Z")


def parts(job: str) -> tuple[str, str, str]:
    """Of NAME:RUN:PID; the run's path may have colons."""
    name, _, rest = job.partition(":")
    run, _, pid = rest.rpartition(":")
    return name, run, pid


def progress(run: Path) -> tuple[int, int | None, str]:
    """Updates done, updates that the run is to have (None: not begun, or it counts epochs), perplexity."""
    about, log = run / "run.json", run / "train.log"
    command = read_json(about)["command"] if about.exists() else []
    total = int(command[command.index("--max-update") + 1]) if "--max-update" in command else None
    for last in records(log, "train_inner")[-1:] if log.exists() else []:
        return int(last["num_updates"]), total, f"perplexity {last['ppl']:.1f}"
    return 0, total, ""


def main(arguments: list[str]) -> None:
    jobs = [(name, Path(run), int(pid)) for name, run, pid in map(parts, arguments)]
    console = Console()
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    next_line, alive = 0.0, True
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = [bars.add_task(name, total=None, note="") for name, *_ in jobs]
        while alive:
            time.sleep(0.5)
            alive = any(running(pid) for *_, pid in jobs)
            plain = not console.is_terminal and (time.monotonic() > next_line or not alive)
            if plain:
                next_line = time.monotonic() + PLAIN_INTERVAL
            for task, (name, run, _) in zip(tasks, jobs, strict=True):
                done, total, note = progress(run)
                bars.update(task, completed=done, total=total, note=note)
                if plain:
                    print(f"  {name}: {done} of {total or '?'} updates {note}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
