"""Settings of scripts/{wmt,lm}/run.sh: checked, and written for the shell to descriptor 3."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.catalogue import TASKS, listing
from experiments.plan import Plan
from experiments.train import check_gpu_for, plan_here
from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.usage import Parser

MODEL = "xmoe-s4-budget-probability"
PLAIN = {"txt", "text", "tok", "tsv", "csv", "src", "tgt"}  # ends of names that are no language
FILES: dict[str, dict[str, str]] = {
    "wmt": {
        "source": "text to translate from: a sentence a line", "target": "its translations, line by line",
        "tsv": "instead: tab-separated, a pair a line", "valid-source": "validation text of your own",
        "valid-target": "its translations", "valid-tsv": "or both in one file",
        "test-source": "test text of your own", "test-target": "its translations",
        "test-tsv": "or both in one file",
    },
    "lm": {
        "text": "a paragraph a line, an empty line between documents; or *.jsonl, *.parquet",
        "valid": "validation text of your own", "test": "test text of your own",
    },
}  # fmt: skip


def argument_parser(task: str) -> argparse.ArgumentParser:
    needed = "--source FILE ... --target FILE ..." if task == "wmt" else "--text FILE ..."
    parser = Parser(
        "run.sh", usage=f"bash scripts/{task}/run.sh {needed} [FLAGS] OUT", epilog=listing(),
        description="From text (plain, .gz or .xz) to a scored model. The same command goes on after a stop.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder for data, model and report; the last word")
    for name, what in FILES[task].items():
        many: dict[str, Any] = {} if name.endswith("tsv") else {"nargs": "+", "default": []}
        add(f"--{name}", type=Path, metavar="FILE", help=what, **many)
    if task == "wmt":
        add("--columns", type=int, nargs=2, default=[1, 2], metavar=("SOURCE", "TARGET"), dest="tsv_columns",
            help="of --tsv, from 1 (default: 1 2)")  # fmt: skip
        add("--languages", nargs=2, metavar=("SOURCE", "TARGET"),
            help="what to call them (default: as the files' names end, else source, target)")  # fmt: skip
    add("--preset", default="tiny", help="size of model and training, see below (default: tiny, on the CPU)")
    add("--model", default=MODEL, help=f"one of those below (default: {MODEL})")
    add("--updates", type=int, help="of training (default: the preset's, or less where the text is short)")
    add("--vocab-size", default="auto", help="pieces (default: auto, as many as fit the text)")
    return parser


def language_of(path: Path) -> str:
    name = re.sub(r"\.[gx]z$", "", path.name)
    return name.rpartition(".")[2] if "." in name else ""


def languages(args: argparse.Namespace) -> list[str]:
    """Raises FlagError."""
    if args.languages:
        if args.languages[0] == args.languages[1] or not all(
            re.fullmatch(r"\w+", one) for one in args.languages
        ):
            raise FlagError(
                f"--languages must be two different words such as en de, got {shlex.join(args.languages)}"
            )
        return list(args.languages)
    found = [language_of(path) for side in (args.source, args.target) for path in side[:1]]
    named = len({*found} - PLAIN) == 2 and all(re.fullmatch(r"[A-Za-z]{2,3}(_\w+)?", one) for one in found)
    return found if named else ["source", "target"]


def check_pairs(args: argparse.Namespace) -> None:
    """Raises FlagError: text that is not there once, or has one side only."""
    for split in ("", "valid-", "test-"):
        source, target, tsv = (
            getattr(args, f"{split}{side}".replace("-", "_")) for side in ("source", "target", "tsv")
        )
        both = f"--{split}source and --{split}target"
        if len(source) != len(target):
            raise FlagError(f"{both} must name as many files, got {len(source)} and {len(target)}")
        if bool(source) + bool(tsv) > 1 or not (split or source or tsv):
            raise FlagError(
                f"{both}, or --{split}tsv, must be given, {'not both' if source else 'got neither'}"
            )


def check(task: str, args: argparse.Namespace) -> None:
    """Raises FlagError."""
    if task == "wmt":
        check_pairs(args)
        if min(args.tsv_columns) < 1 or len({*args.tsv_columns}) == 1:
            got = " ".join(map(str, args.tsv_columns))  # COLUMNS is the shell's own
            raise FlagError(f"--columns must be two different numbers from 1, got {got}")
    elif not args.text:
        raise FlagError("--text must be given: one file of text or more")
    for name in FILES[task]:
        files = getattr(args, name.replace("-", "_")) or []
        for path in files if isinstance(files, list) else [files]:
            if not path.is_file():
                raise FlagError(f"--{name} {path}: {'is no file' if path.exists() else 'No such file'}")
    if args.out.exists() and not args.out.is_dir():
        raise FlagError(f"OUT, the last word, must be a folder, got the file {args.out}")
    if {",", ":"} & {*os.path.abspath(args.out)}:
        raise FlagError(
            f"OUT must have no comma and no colon, which part folders for fairseq, got {args.out}"
        )
    if args.updates is not None and args.updates < 1:
        raise FlagError(f"--updates must be at least 1, got {args.updates}")
    if args.vocab_size != "auto" and not re.fullmatch(r"[1-9]\d*", args.vocab_size):
        raise FlagError(f"--vocab-size must be auto or a number from 1, got {args.vocab_size}")
    check_device(plan_here(task, args.preset, args.model))


def check_device(plan: Plan) -> None:
    if plan.moved_to_gpus:
        check_gpu_for(plan)
    elif not plan.size.cpu:
        import torch  # takes two seconds

        if not torch.cuda.is_available():
            raise FlagError(
                f"--preset {plan.preset} wants a GPU, and there is none here; tiny is for the CPU"
            )


def assignment(name: str, value: Any) -> str:
    """Of the shell: paths are absolute, a list is an array."""

    def word(one: Any) -> str:
        return shlex.quote(os.path.abspath(one) if isinstance(one, Path) else str(one))

    words = (
        f"({' '.join(map(word, value))})" if isinstance(value, list) else word("" if value is None else value)
    )
    return f"{name.upper()}={words}"


def tell_shell(settings: Iterable[tuple[str, Any]]) -> None:
    with os.fdopen(3, "w") as shell:
        shell.writelines(f"{assignment(*one)}\n" for one in settings)


def main() -> None:
    task, *words = sys.argv[1:]
    parser = argument_parser(task if task in TASKS else "wmt")
    if {"-h", "--help"} & {*words}:
        parser.print_help()
        return
    if words and words[-1].startswith("-") and words[-1].partition("=")[0] not in parser.format_help():
        parser.parse_args(["OUT", *words])  # says which flag there is none of
    if not words or words[-1].startswith("-"):
        parser.error("the last word must be OUT, a folder for the results (--help explains the flags)")
    args = parser.parse_args([words[-1], *words[:-1]])
    check(task, args)
    if task == "wmt":
        args.languages = languages(args)
    settings = vars(args)  # OUT is data-prep's own
    tell_shell([("results", settings.pop("out")), *settings.items()])


if __name__ == "__main__":
    main()
