"""Checks everything that only a GPU can show, with PASS, FAIL or SKIP a line. See check_gpu.sh."""

import argparse
import logging
import shutil
import sys
import time
from pathlib import Path

import torch

from experiments.results import write_json
from gpu_check import costs, layers, machine, ranks, training
from gpu_check.outcomes import FAIL, PASS, SKIP, Outcome, is_wanted, outcome_of

# By the first words of the names of their checks; those that train last.
GROUPS = {
    ("machine", "kernel"): machine.checks,
    ("layer",): layers.checks,
    ("cost",): costs.checks,
    ("train", "generate"): training.checks,
    ("ranks",): ranks.checks,
}


def run_checks(case: argparse.Namespace) -> list[Outcome]:
    """A report is written after each, so that there is one of a run that did not end."""
    outcomes: list[Outcome] = []
    for words, checks in GROUPS.items():
        if case.only and not any(each.split()[0] in words for each in case.only):
            continue
        for check in checks(case):
            if not is_wanted(case, check.name):
                continue
            outcomes.append(outcome_of(check))
            print(outcomes[-1], flush=True)
            write_json(case.out / "report.json", report(case, outcomes))
    return outcomes


def report(case: argparse.Namespace, outcomes: list[Outcome]) -> dict[str, object]:
    about = {"device": str(case.device), "updates": case.updates, "date": time.strftime("%Y-%m-%d")}
    return {**about, "versions": case.facts, "checks": outcomes}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash scripts/check_gpu.sh", description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda", help="cpu: all that can run there")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="checks whose names begin with these words, such as layer"
    )
    parser.add_argument("--updates", type=int, default=20, help="of a training (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("runs/check_gpu"), help="folder for report and logs")
    case = parser.parse_args(arguments)
    if case.updates < 4:
        parser.error(f"--updates must be at least 4, got {case.updates}")
    known = [word for words in GROUPS for word in words]
    for each in case.only or ():
        if each.split()[:1] not in [[word] for word in known]:
            parser.error(f"--only must begin with one of {', '.join(known)}, got {each}")
    if case.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("check_gpu: there is no GPU that torch can use; what can run on a CPU: --device cpu")
    return case


def main(arguments: list[str] | None = None) -> None:
    case = parse(arguments)
    case.work = case.out / "work"
    shutil.rmtree(case.work, ignore_errors=True)  # a training would go on from what lies there
    case.work.mkdir(parents=True)
    case.facts = machine.facts(case.device)  # while the GPU answers
    outcomes = run_checks(case)
    count = {result: sum(one.result == result for one in outcomes) for result in (PASS, FAIL, SKIP)}
    print(", ".join(f"{number} {result}" for result, number in count.items()) + f"; {case.out}/report.json")
    sys.exit(1 if count[FAIL] or not count[PASS] else 0)


if __name__ == "__main__":
    logging.getLogger("xmoe_fairseq").setLevel(logging.WARNING)  # a line a check
    main()
