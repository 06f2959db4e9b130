"""Trains and scores models of presets.py, several seeds each, one thread pinned to a core per run.

    python scripts/tools/grid.py wmt|lm PRESET DATA OUT --models MODEL ... [--seeds 1 2 3]

MODEL may have further flags of fairseq-train: "xmoe-s4 --moe-threshold 0.8". A run is OUT/MODEL-SEED; one
that is scored is left alone, one that was stopped goes on from its last checkpoint. All models' first seeds
come first. As many runs at a time as this process may use cores (see taskset).
"""

import argparse
import fcntl
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, Queue

from presets import MODELS, PRESETS, Plan

TOOLS = Path(__file__).resolve().parent


def folder_name(model: str, seed: int) -> str:
    """xmoe-s4 --moe-threshold 0.8 -> xmoe-s4-moe-threshold-0.8-1"""
    return re.sub(r"[^\w.]+", "-", f"{model} {seed}")


def train_and_score(task: str, preset: str, model: str, seed: int, data: Path, run: Path, core: int) -> bool:
    """False if it failed; what it printed is RUN.log."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "SEED": str(seed)}
    name, *flags = shlex.split(model)
    commands = [
        ["taskset", "-c", str(core), sys.executable, str(TOOLS / name), task, *words]
        for name, words in (
            ("train.py", [preset, name, str(data), str(run), *flags]),
            ("score.py", [str(run), "--splits", "test"]),
        )
    ]
    with run.with_name(run.name + ".log").open("a", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"[grid] {run.name}: another process is at it", flush=True)
            return True
        return all(
            subprocess.run(words, stdout=log, stderr=log, env=env).returncode == 0 for words in commands
        )


def work(queue: "Queue[tuple[str, int]]", args: argparse.Namespace, core: int, failed: list[str]) -> None:
    while True:
        try:
            model, seed = queue.get_nowait()
        except Empty:
            return
        run = args.out / folder_name(model, seed)
        if (run / "scores.best.json").exists():
            continue
        print(f"[grid] {run.name} on core {core}, {queue.qsize()} wait", flush=True)
        if not train_and_score(args.task, args.preset, model, seed, args.data, run, core):
            failed.append(run.name)
            print(f"[grid] {run.name} failed: see {run}.log", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=PRESETS)
    parser.add_argument("preset")
    parser.add_argument("data", type=Path, help="folder of data-prep")
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    args = parser.parse_args()
    queue: Queue[tuple[str, int]] = Queue()
    try:
        for seed in args.seeds:
            for model in args.models:
                Plan(args.task, args.preset, model.split()[0], 1).check()
                queue.put((model, seed))
    except ValueError as error:
        raise SystemExit(f"grid: {error}") from None
    if not (args.data / "bin").is_dir():
        raise SystemExit(f"grid: DATA must be a folder of data-prep with bin/ in it, got {args.data}")
    args.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    workers = [
        threading.Thread(target=work, args=(queue, args, core, failed)) for core in os.sched_getaffinity(0)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise SystemExit(
            f"grid: {len(failed)} runs failed: {', '.join(failed)}; the same command tries again"
        )


if __name__ == "__main__":
    main()
