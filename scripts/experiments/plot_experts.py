"""One picture of how many experts each layer's tokens took.

    python scripts/run.py experiments.plot_experts MT=mt/experts.json LM=lm/experts.json --out experts.png

Reads what count_experts.py wrote; one panel per MoE layer.
"""

import argparse
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments import plots
from experiments.results import check_output, read_json
from xmoe_fairseq_compat.errors import UserError

COLUMNS = 3


def layers(arguments: list[str]) -> list[tuple[str, list[int]]]:
    found = []
    for title, _, path in (argument.partition("=") for argument in arguments):
        counts_by_layer = read_json(Path(path))
        if not isinstance(counts_by_layer, dict):
            raise UserError(f"{path}: is not what count_experts wrote")
        for layer, counts in counts_by_layer.items():
            side, _, number = layer.split(".")
            found.append((f"{title}: {side} layer {int(number) + 1}", counts))
    return found


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
    parser.add_argument("inputs", nargs="+", metavar="TITLE=JSON")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    check_output(args.out, *(Path(argument.partition("=")[2]) for argument in args.inputs))
    wanted = layers(args.inputs)
    columns, rows = min(COLUMNS, len(wanted)), math.ceil(len(wanted) / COLUMNS)
    figure, axes = plots.panels(rows, columns, 4 * columns, 3.2 * rows)
    for panel in axes[len(wanted) :]:
        panel.set_visible(False)
    for panel, (title, counts) in zip(axes, wanted, strict=False):
        draw(panel, title, counts)
    plots.save(figure, args.out)


if __name__ == "__main__":
    main()
