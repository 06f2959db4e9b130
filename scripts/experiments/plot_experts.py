"""One picture of how many experts each layer's tokens take, a panel per MoE layer; and the counts as JSON.

    python scripts/run.py experiments.plot_experts --of TITLE CHECKPOINT DATA SPLIT ... --out experts.png

Runs each checkpoint over one split of its data. The counts, of tokens that took 0 experts, 1 expert, ..., are
in experts.json beside the picture.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from experiments import plots
from experiments.results import check_ending, write_json
from xmoe_fairseq.batches import Batches
from xmoe_fairseq.moe import Routing, record_routing
from xmoe_fairseq.thresholds.checkpoint import MAX_TOKENS, open_model

COLUMNS = 3


def experts_taken(routing: Routing) -> Tensor:
    """(E + 1,) number of tokens by number of experts."""
    per_token = torch.bincount(routing.token_R, minlength=routing.num_tokens)
    return torch.bincount(per_token, minlength=routing.num_experts + 1)


@torch.no_grad()
def count(title: str, checkpoint: str, data: str, split: str) -> dict[str, list[int]]:
    """By layer."""
    model, task, _ = open_model(Path(checkpoint), Path(data))
    model.cpu()
    totals: dict[str, Tensor] = {}
    for sample in Batches(task, split, 2**62, MAX_TOKENS, seed=1):
        with record_routing(model) as records:
            model(**sample["net_input"])
        for layer, routing in records:
            side, _, number = layer.name.split(".")
            name = f"{title}: {side} layer {int(number) + 1}"
            totals[name] = totals.get(name, 0) + experts_taken(routing)
    return {name: total.tolist() for name, total in totals.items()}


def draw(panel: Axes, title: str, counts: list[int]) -> None:
    tokens = sum(counts)
    mean = sum(number * count for number, count in enumerate(counts)) / tokens
    largest = max(number for number, count in enumerate(counts) if count)
    shares = [100 * count / tokens for count in counts[1 : largest + 1]]
    panel.bar(range(1, largest + 1), shares, color="#4878a8")
    panel.axvline(mean, color="#c44e52", linestyle="--", label=f"mean {mean:.2f} of {len(counts) - 1}")
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("experts per token")
    panel.set_ylabel("share of tokens (%)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(frameon=False, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = ("TITLE", "CHECKPOINT", "DATA", "SPLIT")
    parser.add_argument("--of", nargs=4, action="append", required=True, metavar=words)
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    check_ending("--out", args.out, ".png")
    torch.set_num_threads(1)
    found = {layer: counts for words in args.of for layer, counts in count(*words).items()}
    columns, rows = min(COLUMNS, len(found)), math.ceil(len(found) / COLUMNS)
    figure, axes = plots.panels(rows, columns, 4 * columns, 3.2 * rows)
    for panel in axes[len(found) :]:
        panel.set_visible(False)
    for panel, (layer, counts) in zip(axes, found.items(), strict=False):
        draw(panel, layer, counts)
    write_json(args.out.with_suffix(".json"), found)
    plots.save(figure, args.out)


if __name__ == "__main__":
    main()
