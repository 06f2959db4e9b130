"""xmoe-explain CHECKPOINT --data DATA | --text TEXT ...: which experts a trained model's tokens take.

For each piece of some sentences, and each MoE layer, how many experts, which, with what probability: in the
terminal, and as a page of HTML that needs no network. The page also shows the load of each expert, and what
lies beside the checkpoint: train.log, moe_load.jsonl, what xmoe-threshold wrote. A decoder's pieces are those
that it reads: of the reference, or with --text of the translation that the model finds.
"""

import argparse
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.utils import import_user_module
from rich.console import Console

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.cost import CostMeter, measured_time
from xmoe_fairseq.explain import terminal
from xmoe_fairseq.explain.beside import beside
from xmoe_fairseq.explain.collect import Layer, Records, Sentence
from xmoe_fairseq.explain.history import read_runs
from xmoe_fairseq.explain.page import page
from xmoe_fairseq.explain.pieces import printable
from xmoe_fairseq.explain.sentences import SPM, of_set, of_text
from xmoe_fairseq.flags import read_field
from xmoe_fairseq.moe import ThresholdRouter, moe_layers
from xmoe_fairseq.moe.records import fix_thresholds
from xmoe_fairseq.moe.routers.registry import DEFAULT, registered_routers
from xmoe_fairseq.thresholds.checkpoint import MAX_TOKENS, check_is_file, open_model
from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.files import write_atomically
from xmoe_fairseq_compat.usage import Parser

PIECES = 256  # of a sentence or block that are shown


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser("xmoe-explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="of a model with MoE layers")
    add("--data", type=Path, help="folder of data-prep or fairseq-preprocess (default: that which the "
        "checkpoint was trained on)")  # fmt: skip
    add("--split", default="valid", help="set of the data whose sentences are taken (default: valid)")
    add("--text", nargs="+", default=[], help="sentences of your own, each one argument; without --data "
        "they alone are counted")  # fmt: skip
    add(SPM, type=Path, metavar="FILE", help="that cuts --text into pieces (default: spm.model of the data)")
    add("--sentences", type=int, default=12, metavar="N", help="shown, spread over the set (default: 12)")
    add("--tokens", type=int, default=20_000, metavar="N", help="of the set, that are counted, in whole "
        "batches; 0 = all (default: 20000)")  # fmt: skip
    add("--moe-threshold", type=float, metavar="T", help="another t, or tau, by the checkpoint's rule")
    add("--runs", type=Path, nargs="+", default=[], metavar="RUN", help="folders of other runs, "
        "with train.log, to compare with")  # fmt: skip
    add("--output", type=Path, help="page to write (default: CHECKPOINT with .html)")
    add("--user-dir", help="of a router of your own, as fairseq's commands have it")
    return parser


def main() -> None:
    explain(argument_parser().parse_args())


def explain(args: argparse.Namespace) -> None:
    """Raises UserError."""
    output, runs = check(args), read_runs(args.checkpoint.parent, args.runs)
    import_user_module(args)
    data = args.data or trained_on(args.checkpoint)
    model, task, cfg = open_model(args.checkpoint, data)
    if not moe_layers(model):
        raise UserError(f"CHECKPOINT must be of a model with experts, and {args.checkpoint} is dense")
    if args.moe_threshold is not None:
        use_threshold(model, args.moe_threshold)
    layers, sentences, counted = look_into(args, data, model, task, cfg)
    about = [*about_model(args.checkpoint, cfg), *counted]
    figures, tables = beside(args.checkpoint, *runs, layers)
    write_atomically(output, page(about, layers, sentences, figures, tables))
    console = Console(width=None if Console().is_terminal else terminal.WIDTH)
    terminal.show(console, about, layers, sentences)
    print(f"written: {output}")


def look_into(
    args: argparse.Namespace, data: Path, model: Any, task: Any, cfg: Any
) -> tuple[list[Layer], list[Sentence], list[tuple[str, str]]]:
    """The layers, with what all tokens made of them; some sentences; and what was counted, in words."""
    records, sentences = Records(model), list[Sentence]()
    meter = CostMeter(model, measured_time(args.checkpoint) if args.moe_threshold is None else "")
    target = task.target_dictionary if hasattr(model, "encoder") else task.source_dictionary
    dictionaries = {"encoder": task.source_dictionary, "decoder": target}
    if args.text:
        text = of_text(model, task, cfg, args.text, args.sentencepiece_model, data)
        sentences += records.sentences(text, dictionaries, PIECES)
    batches: Any
    if args.text and not args.data:
        batches, of = [text], "of the text"
    else:
        batches = Batches(task, args.split, args.tokens or 2**62, MAX_TOKENS, seed=1)
        of = printable(f"of {args.split} in {data}")
        sentences += records.sentences(of_set(task, args.split, args.sentences), dictionaries, PIECES)
    with meter:
        for sample in batches:
            records.count(sample)
    layers = records.totals()
    tokens = ", ".join(f"{number:,} ({side})" for side, number in {o.side: o.tokens for o in layers}.items())
    return layers, sentences, [("cost", meter.line().removeprefix("MoE: ")), ("tokens", f"{tokens} {of}")]


def about_model(checkpoint: Path, cfg: Any) -> list[tuple[str, str]]:
    name = read_field(cfg.model, "moe_router", DEFAULT)
    kind = registered_routers()[name]
    about = [("checkpoint", printable(str(checkpoint))), ("router", f"{name}: {kind.description}")]
    if kind.depends_on_batch == "yes" or read_field(cfg.model, "moe_eval_capacity_factor", 0.0):
        about.append(("note", "a token's experts depend on its batch: here on the sentences shown"))
    return about


def use_threshold(model: Any, threshold: float) -> None:
    """Raises FlagError."""
    layers = moe_layers(model)
    if not all(isinstance(getattr(layer, "router", None), ThresholdRouter) for layer in layers):
        raise FlagError("--moe-threshold goes with --moe-router threshold, and the checkpoint has another")
    try:
        fix_thresholds(model, [threshold] * len(layers))
    except ValueError as error:
        raise FlagError(f"--moe-threshold: {error}") from None


def trained_on(checkpoint: Path) -> Path:
    """Raises FlagError: it is not there."""
    cfg = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))["cfg"]
    data = Path(str(cfg.task.data).partition(":")[0])
    if not data.is_dir():
        raise FlagError(f"--data must be given: {checkpoint} was trained on {data}, which is not there")
    return data


def check(args: argparse.Namespace) -> Path:
    """The page to write. Raises UserError."""
    check_is_file(args.checkpoint)
    for name, least in (("sentences", 1), ("tokens", 0)):
        if getattr(args, name) < least:
            raise FlagError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    output: Path = args.output or args.checkpoint.with_suffix(".html")
    if output.suffix != ".html" or output.is_dir():
        raise FlagError(f"--output must be a file that ends in .html, got {output}")
    if output.exists() and output.samefile(args.checkpoint):
        raise FlagError(
            f"--output {output} is the checkpoint itself, which would be overwritten; name another"
        )
    return output


if __name__ == "__main__":
    main()
