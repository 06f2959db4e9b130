"""Trains a model of models.toml with fairseq-train: says what, notes it in RUN/run.json, logs to train.log.

    bash scripts/wmt|lm/train.sh PRESET MODEL DATA RUN [FLAGS OF fairseq-train ...]

DATA is a folder of data-prep (bin/, further shards bin1/ ..., text/). FLAGS take the place of the preset's.
The same command again resumes. GPUS=n: processes (default: those there are; presets for the CPU go there
unless it is given); SEED=1. With --dry-run among FLAGS nothing is trained or written: parameters, FLOPs,
memory of a GPU and hours are told; DATA need not be there.
"""

import argparse
import os
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments import processes
from experiments.catalogue import TASKS, listing
from experiments.plan import Plan
from experiments.results import read_run, write_json
from xmoe_fairseq_compat.errors import FlagError

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TRAINER, DRY_RUN = str(BIN / "fairseq-train"), "--dry-run"


def languages(binarised: Path) -> tuple[str, str]:
    """Of binarised pairs, from the files' names: train.en-de.en.idx."""
    for path in sorted(binarised.glob("train.*-*.*.idx")):
        if found := re.fullmatch(r"train\.(\w+)-(\w+)\.\1\.idx", path.name):
            return found[1], found[2]
    raise FlagError(f"DATA must hold binarised pairs, bin/train.SRC-TGT.SRC.idx, got {binarised.parent}")


def shards(data: Path, task: str) -> str:
    """bin, bin1, bin2, ... as fairseq wants several folders of training data."""
    from xmoe_fairseq.batches import with_further_shards  # takes three seconds

    first = data / "bin"
    if not (first / ("dict.txt" if task == "lm" else ".")).exists():
        raise FlagError(f"DATA must be a folder of data-prep with bin/ in it, got {data}")
    return with_further_shards(first, data)


def inputs(plan: Plan, data: Path) -> list[str]:
    """Where fairseq finds the text; for translation, between which languages."""
    if plan.task == "lm":
        return [shards(data, "lm")]
    source, target = languages(data / "bin")
    return [shards(data, "wmt"), "--source-lang", source, "--target-lang", target]


def command(
    plan: Plan, data: Path, run: Path, seed: int, more: list[str], dry_run: bool = False
) -> list[str]:
    """
    Args:
        dry_run: neither DATA nor a GPU need be there.

    Raises:
        FlagError: one line.
    """
    if plan.moved_to_gpus and not dry_run:
        check_gpu_for(plan)
    text = [str(data)] if dry_run and not (data / "bin").exists() else inputs(plan, data)
    trainer = [TRAINER]
    if plan.gpus > 1:
        trainer = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(plan.gpus), *trainer]
    elif not plan.on_cpu:
        more = ["--distributed-world-size", "1", *more]  # fairseq would take every GPU that it sees
    common = ["--log-format", "json", "--seed", str(seed), "--save-dir", str(run)]
    if plan.size.experts:
        common += ["--user-dir", str(ROOT / "xmoe_fairseq")]
    return [*trainer, *text, *common, *plan.flags(more)]


def describe(plan: Plan, data: Path, seed: int, flags: list[str], words: list[str]) -> dict[str, Any]:
    return {
        "task": plan.task, "preset": plan.preset, "model": plan.model, "data": str(data), "seed": seed,
        "gpus": plan.gpus, "moved_to_gpus": plan.moved_to_gpus, "flags": flags,
        "about": plan.lines(flags), "command": words,
        "versions": {name: version(name) for name in ("torch", "fairseq", "sacrebleu")},
    }  # fmt: skip


def note(run: Path, about: dict[str, Any]) -> None:
    """Raises FlagError if another training is in this folder already."""
    path = run / "run.json"
    if path.exists():
        there = read_run(run)
        there.setdefault("moved_to_gpus", False)
        for key in ("task", "preset", "model", "data", "seed", "moved_to_gpus"):
            if there[key] != about[key]:
                raise FlagError(
                    f"RUN {run} holds a run with {key} {there[key]}, not {about[key]}; name a new one"
                )
    run.mkdir(parents=True, exist_ok=True)
    write_json(path, about)


def run_logged(words: list[str], log: Path) -> int:
    with log.open("a", buffering=1, encoding="utf-8") as file:

        def show(line: str) -> None:
            print(line, end="", flush=True)
            file.write(line)

        return processes.run(words, show)


def integer(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdigit():
        raise FlagError(f"{name} must be a whole number, got {value}")
    return int(value)


def gpus() -> int:
    import torch  # takes two seconds

    return integer("GPUS", max(torch.cuda.device_count(), 1))


def check_gpu_for(plan: Plan) -> None:
    import torch  # takes two seconds

    if not torch.cuda.is_available():  # fairseq would take the CPU without a word
        raise FlagError(
            f"GPUS={plan.gpus} puts preset {plan.preset} on GPUs, and torch finds none here; leave GPUS out"
        )


def plan_here(task: str, preset: str, model: str) -> Plan:
    """On this machine's GPUs, but a preset for the CPU there, unless GPUS asks for some."""
    plan = Plan(task, preset, model)
    if plan.size.cpu and not integer("GPUS", 0):
        return plan
    return Plan(task, preset, model, gpus(), moved_to_gpus=plan.size.cpu)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train", description=__doc__.splitlines()[0], epilog=listing(),
        usage="bash scripts/wmt|lm/train.sh PRESET MODEL DATA RUN [FLAGS OF fairseq-train ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("preset")
    parser.add_argument("model")
    parser.add_argument("data", type=Path, help="folder of data-prep")
    parser.add_argument("run", type=Path, help="folder for checkpoints and logs")
    further = "further flags of fairseq-train; --dry-run: count and tell, train nothing"
    flags = parser.add_argument("flags", nargs=argparse.REMAINDER, help=further)
    flags.required = False  # or "the following arguments are required" names it
    return parser.parse_args()


def main() -> None:
    args = parse()
    plan, seed = plan_here(args.task, args.preset, args.model), integer("SEED", 1)
    data, run = args.data.resolve(), args.run.resolve()
    if DRY_RUN in args.flags:
        from experiments.dry_run import tell  # fairseq takes seconds

        flags = [word for word in args.flags if word != DRY_RUN]
        words = command(plan, data, run, seed, flags, dry_run=True)
        tell(plan, words[words.index(TRAINER) + 1 :], data, flags)
        return
    words = command(plan, data, run, seed, args.flags)
    note(run, describe(plan, data, seed, args.flags, words))
    for line in [*plan.lines(args.flags), shlex.join(words)]:
        print(f"[train] {line}", flush=True)
    raise SystemExit(run_logged(words, run / "train.log"))


if __name__ == "__main__":
    main()
