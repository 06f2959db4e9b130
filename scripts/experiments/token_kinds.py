"""What kind of token takes many experts: of a trained model, over validation text.

    python scripts/run.py experiments.token_kinds RUN ... [--split valid] [--tokens 100000] --out FILE

Experts per token in each MoE layer, mean and standard deviation, by
    frequency   of the piece in the training text: ten groups of about as many tokens, rare ones first
    kind        first piece of a word, further piece, with a digit, punctuation alone, other (such as </s>)
    position    in the block or sentence: 0, 1, 2-3, 4-7, ...
    own loss    of predicting the piece itself, in bits: quarters; decoders alone have losses
    next loss   of predicting the piece that follows
and how far each says it: the share of the variance that is between its groups (adjusted for their number; of
`piece` each piece is a group), and Spearman's rank correlation where there is an order. Tables by side. RUNs
are of one model and differ in the seed: their tokens are taken together. Writes FILE.md, FILE.json, FILE.png.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments import plots
from experiments.results import publish, read_run
from experiments.runs import Run, alike, rows_of
from experiments.token_records import Tokens, records_of
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.errors import UserError

Array = NDArray[Any]
KINDS = ("first piece", "further piece", "digit", "punctuation", "other")
SPACE = "\u2581"  # sentencepiece's
COLOURS = ("#2070b4", "#d9772b", "#2ca05a", "#c2528b", "#8d6bd1", "#8a7f2d")  # of layers


def kind(piece: str) -> int:
    """Its place in KINDS."""
    text = piece.removeprefix(SPACE)
    if not text or (text.startswith("<") and text.endswith(">")):  # </s>, <unk>, a byte
        return KINDS.index("other")
    if any(c.isdigit() for c in text):
        return KINDS.index("digit")
    if not any(c.isalpha() for c in text):
        return KINDS.index("punctuation")
    return KINDS.index("first piece" if piece.startswith(SPACE) else "further piece")


def quantiles(value_N: Array, number: int) -> tuple[list[str], Array]:
    """Groups of about as many tokens, fewer where values repeat, by their ranges; -1: there is no value."""
    known_N = ~np.isnan(value_N)
    edges = np.unique(np.quantile(value_N[known_N], np.linspace(0, 1, number + 1)))
    group_N = np.where(known_N, np.searchsorted(edges[1:-1], value_N, side="right"), -1)
    texts = [f"{edge:,.0f}" if edge >= 100 else f"{edge:.2g}" for edge in edges]
    return [f"{low}-{high}" for low, high in pairwise(texts)], group_N


def properties(tokens: Tokens) -> dict[str, tuple[list[str], Array]]:
    """The names of the groups, and that of each token, of each property."""
    octave_N = np.floor(np.log2(np.maximum(tokens.position_N, 0.5))).astype(int) + 1
    octaves = ["0", "1", *(f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, octave_N.max()))]
    kind_V = np.array([kind(piece) for piece in tokens.pieces])
    found = {
        "frequency": quantiles(tokens.frequency_N, 10), "kind": ([*KINDS], kind_V[tokens.id_N]),
        "position": (octaves[: octave_N.max() + 1], octave_N),
    }  # fmt: skip
    if not np.isnan(tokens.next_N).all():
        found |= {"own loss": quantiles(tokens.own_N, 4), "next loss": quantiles(tokens.next_N, 4)}
    return found


def explained(value_N: Array, group_N: Array) -> float:
    """The share of the variance that is between groups, adjusted for their number; NaN without variance."""
    _, group_N, count_G = np.unique(group_N, return_inverse=True, return_counts=True)
    mean_G = np.bincount(group_N, value_N) / count_G
    within = np.square(value_N - mean_G[group_N]).sum() / max(len(value_N) - len(count_G), 1)
    return float(1 - within / total) if (total := value_N.var(ddof=1)) else np.nan


def ranks(value_N: Array) -> Array:
    """From 1, equal ones their mean."""
    _, place_N, count_U = np.unique(value_N, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count_U) - (count_U - 1) / 2)[place_N])


def rank_correlation(a_N: Array, b_N: Array) -> float:
    """Spearman's, of those that both have a value; NaN without variance."""
    known_N = ~(np.isnan(a_N) | np.isnan(b_N))
    a_N, b_N = ranks(a_N[known_N]), ranks(b_N[known_N])
    return float(np.corrcoef(a_N, b_N)[0, 1]) if a_N.std() and b_N.std() else np.nan


def group_rows(tokens: Tokens, found: dict[str, tuple[list[str], Array]]) -> list[dict[str, Any]]:
    """A row for each group that has tokens."""
    rows = []
    for name, (labels, group_N) in found.items():
        for number, label in enumerate(labels):
            own_ML = tokens.experts_NL[group_N == number]
            if len(own_ML):
                of_layers = {"mean": own_ML.mean(0).tolist(), "deviation": own_ML.std(0).tolist()}
                rows.append({"property": name, "group": label, "tokens": len(own_ML), **of_layers})
    return rows


def strengths(tokens: Tokens, found: dict[str, tuple[list[str], Array]]) -> list[dict[str, Any]]:
    ordered = {
        "frequency": tokens.frequency_N, "position": tokens.position_N, "own loss": tokens.own_N,
        "next loss": tokens.next_N,
    }  # fmt: skip
    rows = []
    for name, group_N in {
        "piece": tokens.id_N,
        **{name: group_N for name, (_, group_N) in found.items()},
    }.items():
        known_N, layers = group_N >= 0, tokens.experts_NL.T
        row: dict[str, Any] = {"explained": [explained(l_N[known_N], group_N[known_N]) for l_N in layers]}
        if name in ordered:
            row["rank correlation"] = [rank_correlation(l_N, ordered[name]) for l_N in layers]
        rows.append({"property": name, **row})
    return rows


def tables(side: str, layers: list[str], groups: list[dict[str, Any]], how_far: list[dict[str, Any]]) -> str:
    total = sum(row["tokens"] for row in groups if row["property"] == "kind")
    by_group = [
        [row["property"], row["group"], f"{100 * row['tokens'] / total:.1f}",
         *(f"{m:.2f} ± {d:.2f}" for m, d in zip(row["mean"], row["deviation"], strict=True))]
        for row in groups
    ]  # fmt: skip
    by_property = [
        [row["property"], *(f"{x:.3f}" for x in row["explained"]),
         *(f"{x:+.3f}" for x in row.get("rank correlation", ())), *["-"] * len(layers)][: 1 + 2 * len(layers)]
        for row in how_far
    ]  # fmt: skip
    head = [f"{what}, {layer}" for what in ("variance explained", "rank correlation") for layer in layers]
    first = markdown(["property", "group", "tokens, %", *layers], by_group)
    return f"## {side}\n\n{first}\n{markdown(['property', *head], by_property)}\n"


def draw(sides: dict[str, dict[str, Any]], path: Path) -> None:
    names = [[*dict.fromkeys(row["property"] for row in side["groups"])] for side in sides.values()]
    columns = max(map(len, names))
    figure, axes = plots.panels(len(sides), columns, 4 * columns, 3.6 * len(sides), sharey="row")
    for number, (side, own) in enumerate(zip(sides.values(), names, strict=True)):
        for column, panel in enumerate(axes[number * columns : (number + 1) * columns]):
            if column < len(own):
                rows = [row for row in side["groups"] if row["property"] == own[column]]
                draw_property(panel, rows, side["layers"])
            panel.set_visible(column < len(own))
    plots.save(figure, path)


def draw_property(panel: Any, rows: list[dict[str, Any]], layers: list[str]) -> None:
    places, ends = range(len(rows)), []
    for layer, colour in zip(range(len(layers)), COLOURS * len(layers), strict=False):
        mean_G, deviation_G = (np.array([row[what][layer] for row in rows]) for what in ("mean", "deviation"))
        panel.plot(places, mean_G, "o-", color=colour, markersize=4)
        panel.fill_between(places, mean_G - deviation_G, mean_G + deviation_G, color=colour, alpha=0.1)
        ends.append((places[-1], mean_G[-1], layers[layer], colour))
    panel.set_xticks(places, [row["group"] for row in rows], rotation=45, ha="right", fontsize=plots.SMALL)
    panel.set_title(f"experts/token by {rows[0]['property']}", fontsize=10, loc="left")
    plots.label_ends(panel, ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN")
    add("--split", default="valid")
    add("--tokens", type=int, default=100_000, help="of the text (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="FILE", help="to write, without .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = rows_of(alike([Run(folder, read_run(folder), {}) for folder in args.runs]))
    if len(rows) > 1:
        raise UserError(f"RUNs must be of one model, and differ in the seed, got {'; '.join(rows)}")
    sides: dict[str, dict[str, Any]] = {}
    for side, tokens in records_of(args.runs, args.split, args.tokens).items():
        if not tokens.experts_NL.var(0).any():
            always = f"{tokens.experts_NL[0, 0]:g} experts in each layer of the {side}"
            raise UserError(f"RUN {args.runs[0]}: all tokens take {always}; name one whose tokens differ")
        found = properties(tokens)
        groups, how_far = group_rows(tokens, found), strengths(tokens, found)
        sides[side] = {"layers": tokens.layers, "groups": groups, "how far": how_far}
    text = "".join(tables(side, *each.values()) for side, each in sides.items())
    publish(args.out, text, sides)
    draw(sides, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
