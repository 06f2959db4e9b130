"""One picture of how many experts each layer's tokens took.

    python scripts/tools/plot_experts.py MT=mt/experts.json LM=lm/experts.json --out experts.png

Reads what count_experts.py wrote; one panel per MoE layer.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)
from results import ResultError, check_output  # noqa: E402

COLUMNS = 3


def panels(arguments: list[str]) -> list[tuple[str, list[int]]]:
    found = []
    for argument in arguments:
        title, _, path = argument.partition("=")
        for layer, counts in json.loads(Path(path).read_text()).items():
            side, _, number = layer.split(".")
            found.append((f"{title}: {side} layer {int(number) + 1}", counts))
    return found


def draw(axes: plt.Axes, title: str, counts: list[int]) -> None:
    tokens = sum(counts)
    shares = [100 * count / tokens for count in counts]
    mean = sum(number * count for number, count in enumerate(counts)) / tokens
    largest = max(number for number, count in enumerate(counts) if count)
    axes.bar(range(1, largest + 1), shares[1 : largest + 1], color="#4878a8")
    axes.axvline(mean, color="#c44e52", linestyle="--", label=f"mean {mean:.2f} of {len(counts) - 1}")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("experts per token")
    axes.set_ylabel("share of tokens (%)")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", metavar="TITLE=JSON")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    try:
        check_output(args.out, *(Path(argument.partition("=")[2]) for argument in args.inputs))
        wanted = panels(args.inputs)
    except (ResultError, OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"plot_experts: {' '.join(map(str, args.inputs))}: {error}") from None
    columns, rows = min(COLUMNS, len(wanted)), math.ceil(len(wanted) / COLUMNS)
    size = (4 * columns, 3.2 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(wanted) :]:
        axes.set_visible(False)
    for axes, (title, counts) in zip(grid.flat, wanted, strict=False):
        draw(axes, title, counts)
    partial = args.out.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    partial.rename(args.out)


if __name__ == "__main__":
    main()
