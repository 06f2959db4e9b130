"""Trains and scores models of models.toml, several seeds each, one thread pinned to a core per run.

    python scripts/run.py experiments.grid wmt|lm PRESET DATA OUT --models MODEL ... [--seeds 1 2 3]

MODEL may have further flags of fairseq-train: "xmoe-s4 --moe-threshold 0.8". A run is OUT/MODEL-SEED; one
that is scored is left alone, one that was stopped goes on from its last checkpoint. All models' first seeds
come first. As many runs at a time as this process may use cores (see taskset).
"""

import argparse
import fcntl
import os
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from experiments import processes
from experiments.catalogue import TASKS, models
from experiments.plan import Plan
from experiments.train import ROOT, shards
from xmoe_fairseq_compat.errors import UserError


def folder_name(model: str, seed: int) -> str:
    """xmoe-s4 --moe-threshold 0.8 -> xmoe-s4-moe-threshold-0.8-1"""
    return re.sub(r"[^\w.]+", "-", f"{model} {seed}")


def train_and_score(
    task: str, preset: str, model: str, seed: int, data: Path, run: Path, core: int, splits: list[str]
) -> bool:
    """False if it failed; what it printed is RUN.log."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "SEED": str(seed)}
    name, *flags = shlex.split(model)
    python = ["taskset", "-c", str(core), sys.executable, str(ROOT / "scripts/run.py")]
    commands = [
        ["experiments.train", task, preset, name, str(data), str(run), *flags],
        ["experiments.score", task, str(run), "--splits", *splits],
    ]
    with run.with_name(run.name + ".log").open("a", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"[grid] {run.name}: another process is at it", flush=True)
            return True
        return not any(processes.run([*python, *c], stdout=log, stderr=log, env=env) for c in commands)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("preset")
    parser.add_argument("data", type=Path, help="folder of data-prep")
    parser.add_argument("out", type=Path, help="folder for the runs")
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL", help=f"of {', '.join(models())}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--splits", nargs="+", default=["test"], metavar="SPLIT")
    args = parser.parse_args()
    for model in args.models:
        Plan(args.task, args.preset, model.split()[0])
    shards(args.data, args.task)
    args.out.mkdir(parents=True, exist_ok=True)
    cores: Queue[int] = Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def one(model: str, seed: int) -> str | None:
        """The name of a run that failed."""
        run: Path = args.out / folder_name(model, seed)
        if (run / "scores.best.json").exists():
            return None
        core = cores.get()
        print(f"[grid] {run.name} on core {core}", flush=True)
        try:
            if train_and_score(args.task, args.preset, model, seed, args.data, run, core, args.splits):
                return None
        finally:
            cores.put(core)
        print(f"[grid] {run.name} failed: see {run}.log", flush=True)
        return run.name

    with ThreadPoolExecutor(cores.qsize()) as pool:
        names = pool.map(lambda job: one(*job), [(m, seed) for seed in args.seeds for m in args.models])
    if failed := list(filter(None, names)):
        raise UserError(f"{len(failed)} runs failed: {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    main()
