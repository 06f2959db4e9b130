"""What was found, in a terminal."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xmoe_fairseq.explain.collect import Choice, Layer, Sentence, cost

SENTENCES, PIECES = 3, 40  # shown; the page has all
WIDTH = 160  # where it is written to a file
COLOURS = ("dim", "default", "yellow", "dark_orange", "red")  # none, one, ... up to all that any piece has
DEAD = 12  # experts that are named


def show(
    console: Console, about: Sequence[tuple[str, str]], layers: Sequence[Layer], sentences: Sequence[Sentence]
) -> None:
    """Nothing of a text is taken for rich's markup."""
    for name, value in about:
        console.print(Text(f"{name}: {value}"))
    console.print(layer_table(layers))
    most = most_experts(layers, sentences)
    for number, sentence in enumerate(sentences[:SENTENCES], 1):
        for table in sentence_tables(number, sentence, layers, most):
            console.print(table)
    if len(sentences) > SENTENCES:
        console.print(Text(f"{SENTENCES} of {len(sentences)} sentences; the page has all"))


def layer_table(layers: Sequence[Layer]) -> Table:
    table = Table(
        "MoE layer", "experts per token", "of", "FLOPs / dense FFN", "largest load", "without a token"
    )
    for layer in layers:
        dead = ", ".join(layer.dead[:DEAD]) + (", ..." if len(layer.dead) > DEAD else "")
        experts, flops = cost([layer])
        of, idle = str(layer.routed + layer.shared), f"{len(layer.dead)} ({dead})" if dead else "none"
        loads = (f"{max(layer.loads):.2f} x even", idle)
        table.add_row(layer.name, f"{experts:.2f}", of, f"{flops:.2f}", *loads)
    return table


def most_experts(layers: Sequence[Layer], sentences: Sequence[Sentence]) -> int:
    """That a piece has."""
    return max(
        layer.computing(choices)
        for sentence in sentences
        for layer, of_pieces in zip(layers, sentence.choices, strict=True)
        for choices in of_pieces
    )


def sentence_tables(
    number: int, sentence: Sentence, layers: Sequence[Layer], most: int
) -> Iterator[Table | Text]:
    for side, pieces in sentence.pieces.items():
        here = [(layer, of) for layer, of in zip(layers, sentence.choices, strict=True) if layer.side == side]
        if not here:  # its layers are dense
            continue
        title = Text(f"{number}. {side}: experts, and each one's probability")
        table = Table(side, *(layer.name for layer, _ in here), title=title, title_justify="left")
        for place, piece in enumerate(pieces[:PIECES]):
            table.add_row(Text(piece), *(cell(layer, of[place], most) for layer, of in here))
        yield table
        if len(pieces) > PIECES:
            yield Text(f"and {len(pieces) - PIECES} pieces more")


def cell(layer: Layer, choices: Sequence[Choice], most: int) -> Text:
    """Such as "2: 5 0.41, 1 0.20"."""
    number = layer.computing(choices)
    named = [f"{layer.experts[choice.expert]} {choice.probability:.2f}" for choice in choices]
    named += ["shared"] * bool(layer.shared)
    colour = COLOURS[-(-number * (len(COLOURS) - 1) // max(most, 1))]
    return Text.assemble((str(number), colour), ": " if named else "", ", ".join(named))
