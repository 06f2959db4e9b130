"""The paper's trainings, each counted as by --dry-run: parameters, FLOPs, memory of a GPU, hours.

    bash scripts/paper_table.sh          (a test says when docs/paper_runs.md must have its tables anew)

UTILISATION=0.3, as for --dry-run.
"""

from pathlib import Path

from experiments import costs
from experiments.costs import PEAKS, Found
from experiments.dry_run import between
from experiments.plan import Plan
from xmoe_fairseq.tables import markdown

BUDGETS = ("xmoe-s4-budget-probability", "xmoe-s8-budget-probability")
MODELS = {
    "lm": ("dense", "switch", "topk-s2", "xmoe-s1", "xmoe-s2", "xmoe-s4", "xmoe-s8", "split-s8", *BUDGETS),
    "wmt": ("dense", "switch", "topk-s2", "topk-s4", "xmoe-s2", "xmoe-s4", "split-s8", *BUDGETS),
}
GPUS = (2, 8)  # hours on so many


def titles() -> list[str]:
    hours = [f"hours, {gpus} {gpu}" for gpu in PEAKS for gpus in GPUS]
    return ["model", "parameters, M", "experts per token", "GFLOPs per token", "MoE layers'", "GB", *hours]


def row(model: str, found: Found) -> list[str]:
    all_, moe = (between(pair, 3) for pair in found.gflops())
    hours = [
        between((least / gpus, most / gpus), 1)
        for least, most in map(found.gpu_hours, PEAKS)
        for gpus in GPUS
    ]
    experts, moe = (between(found.experts), moe) if found.shape.held else ("-", "-")
    parameters, memory = f"{found.parameters.total() / 1e6:.1f}", f"{found.gigabytes:.1f}"
    return [f"`{model}`", parameters, experts, all_, moe, memory, *hours]


def find(task: str, model: str) -> Found:
    plan = Plan(task, "paper", model, GPUS[-1])
    return costs.find(plan, ["data", *plan.flags()], Path("no data"))


def table(task: str) -> str:
    return markdown(titles(), [row(model, find(task, model)) for model in MODELS[task]])


if __name__ == "__main__":
    for task, title in (("lm", "Language model"), ("wmt", "Translation")):
        print(f"### {title}\n\n{table(task)}", flush=True)
