"""Scores a dense checkpoint and its conversions on test sets, by the stock commands: one table.

    python scripts/run.py experiments.score_conversions lm|mt DATA DENSE.pt SPARSE.pt ... --out FOLDER

Translation: BLEU and chrF of detokenised text; language models: perplexity per token. What was printed
stays in FOLDER, beside scores.md and scores.json.
"""

import argparse
from argparse import Namespace
from pathlib import Path

from experiments.evaluation import call, hypotheses, last_number, of_checkpoint, score, search
from experiments.results import lines, publish
from experiments.train import languages
from xmoe_fairseq.tables import markdown
from xmoe_fairseq_compat.errors import UserError


def translation(args: Namespace, checkpoint: Path, split: str, log: Path) -> dict[str, float]:
    flags = ("--gen-subset", split, *search(args.beam), "--max-tokens", 2000)
    command = [*of_checkpoint("fairseq-generate", args.data, checkpoint), *flags]
    output = call(command, log, made_from=checkpoint)
    reference = lines(args.data / "text" / f"{split}.{languages(args.data / 'bin')[1]}")
    return score(hypotheses(output), reference, ("bleu", "chrf"))[0]


def language_model(args: Namespace, checkpoint: Path, split: str, log: Path) -> dict[str, float]:
    # The same for all checkpoints, whatever each was trained with.
    flags = ("--gen-subset", split, "--tokens-per-sample", args.context, "--batch-size", 8)
    command = [*of_checkpoint("fairseq-eval-lm", args.data, checkpoint), *flags]
    return {"perplexity": last_number(call(command, log, made_from=checkpoint), "Perplexity:")}


TASKS = {"lm": language_model, "mt": translation}


def names_of(checkpoints: list[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for checkpoint in checkpoints:
        if not checkpoint.is_file():
            raise UserError(f"CHECKPOINT {checkpoint}: No such file")
        name = checkpoint.parent.name if checkpoint.stem == "checkpoint_last" else checkpoint.stem
        if name in named:
            raise UserError(f"two checkpoints are called {name}: the second is {checkpoint}")
        named[name] = checkpoint
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path, help="folder of data-prep")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--beam", type=int, default=5, help="of translation")
    parser.add_argument("--context", type=int, default=128, help="tokens per sample of a language model")
    args = parser.parse_args()
    splits = sorted({path.name.split(".")[0] for path in (args.data / "bin").glob("test*.idx")})
    if not splits:
        raise UserError(f"DATA must hold bin/test*.idx, got {args.data}")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, float]] = {}
    for name, checkpoint in names_of(args.checkpoints).items():
        results[name] = {}
        for split in splits:
            found = TASKS[args.task](args, checkpoint, split, args.out / f"{name}.{split}.out")
            results[name] |= {f"{split} {key}": value for key, value in found.items()}
    titles = [*next(iter(results.values()))]
    rows = [[name, *(f"{value:.2f}" for value in found.values())] for name, found in results.items()]
    publish(args.out / "scores", markdown(["checkpoint", *titles], rows), results)


if __name__ == "__main__":
    main()
