"""train.sh --dry-run: tells what a training would be, instead of training.

If what is counted is not what arithmetic gives, the command ends with status 1. DATA need not be there: then
the sizes are the paper's. Nothing is written. UTILISATION=0.3: share of a GPU's peak that an update reaches;
nobody has measured it.
"""

from pathlib import Path

from experiments.costs import PEAKS, Found, find, utilisation
from experiments.plan import Plan

MEMORY = 80e9  # bytes of a GPU of PEAKS


def between(pair: tuple[float, float], digits: int = 0) -> str:
    least, most = (f"{number:,.{digits}f}" for number in pair)
    return least if least == most else f"{least} to {most}"


def fitting(found: Found) -> str:
    """What to give where a batch does not fit; "" = it does."""
    memory, shape, plan = found.memory, found.shape, found.plan
    if sum(memory.values()) <= MEMORY or plan.on_cpu:
        return ""
    fixed = memory["states"] + memory["beside"] + memory.get("buckets", 0)
    batch = sum(memory.values()) - fixed
    room, each = MEMORY - fixed, batch / shape.sentences
    parts = [n for n in range(2, shape.sentences + 1) if shape.sentences % n == 0]
    fits = next((n for n in parts if shape.sentences / n * each <= room), 0)
    if not fits:
        return "does not fit into 80 GB, nor would a single sentence: --moe-expert-parallel-size on more GPUs"
    sentences = shape.sentences // fits
    flag = f"--batch-size {sentences}" if plan.task == "lm" else f"--max-tokens {found.tokens // fits}"
    return f"does not fit into 80 GB: {flag} --update-freq {plan.update_freq * fits} would, and is as good"


def lines(found: Found) -> list[str]:
    """What `tell` prints."""
    plan, total = found.plan, found.parameters.total()
    parts = ", ".join(f"{part} {number:,}" for part, number in found.parameters.items())
    all_, moe = (between(pair, 3) for pair in found.gflops())
    of_moe = f", of which MoE layers {moe}; routed experts per token {between(found.experts, 1)}"
    hours = ", ".join(f"{gpu} {between(found.gpu_hours(gpu), 1)}" for gpu in PEAKS)
    memory = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in found.memory.items())
    batch = f"{found.shape.sentences:,} x {found.shape.stacks[-1].length:,} tokens"
    return [
        f"text: {found.text.about(plan.task)}; a batch is {batch}",
        f"parameters on a rank: {total:,} ({parts})",
        f"FLOPs, forward, of a token: {all_} G" + (of_moe if found.shape.held else ""),
        f"training: {found.batches * found.tokens / 1e9:,.3f} G tokens; GPU hours, to be divided by the "
        f"number of GPUs, at {utilisation():g} of the peak (assumed): {hours}",
        f"memory of a {'process' if plan.on_cpu else 'GPU'}, GB: {found.gigabytes:.1f} ({memory})",
        *filter(None, [fitting(found)]),
    ]


def tell(plan: Plan, words: list[str], data: Path, more: list[str]) -> None:
    """Raises as `find`."""
    found = find(plan, words, data)
    for line in [*plan.lines(more), *lines(found)]:
        print(f"[dry run] {line}", flush=True)
    print("[dry run] parameters, FLOPs and memory are as arithmetic says; nothing was written", flush=True)
