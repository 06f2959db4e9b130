"""Scores a dense checkpoint and its conversions on test sets, by the stock commands: one table.

    python scripts/tools/score_conversions.py lm|mt DATA DENSE.pt SPARSE.pt ... --out FOLDER

Translation: BLEU and chrF of detokenised text; language models: perplexity per token. What was printed
stays in FOLDER, beside scores.md and scores.json.
"""

import argparse
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from presets import LENGTHS
from results import ResultError, hypotheses, lines, markdown, read, score, write, write_json
from train import ROOT, languages

METRICS = ("bleu", "chrf")


def stock(tool: str, data: Path, checkpoint: Path, split: str, flags: list[str], log: Path) -> Path:
    """Runs a stock command, unless what it printed for this checkpoint is there; the log begins with it."""
    words = [str(Path(sys.executable).parent / tool), str(data / "bin"), "--path", str(checkpoint)]
    words += ["--user-dir", str(ROOT / "xmoe_fairseq"), "--gen-subset", split, "--num-workers", "0", *flags]
    command = shlex.join(words)
    if log.exists() and log.stat().st_mtime >= checkpoint.stat().st_mtime and lines(log)[0] == command:
        return log
    print(f"[score] {command}", flush=True)
    partial = log.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        print(command, file=file, flush=True)
        status = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
    if status:
        raise ResultError(f"{tool} failed: {lines(partial)[-1]} (all of it: {partial})")
    return partial.rename(log)


def translation(data: Path, checkpoint: Path, split: str, args: Namespace, log: Path) -> dict[str, float]:
    flags = ["--beam", str(args.beam), "--remove-bpe", "sentencepiece", "--max-tokens", "2000"]
    for name, value in LENGTHS.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    output = stock("fairseq-generate", data, checkpoint, split, flags, log)
    reference = lines(data / "text" / f"{split}.{languages(data / 'bin')[1]}")
    return score(hypotheses(output), reference, METRICS)[0]


def language_model(data: Path, checkpoint: Path, split: str, args: Namespace, log: Path) -> dict[str, float]:
    # The same for all checkpoints, whatever each was trained with.
    flags = ["--tokens-per-sample", str(args.context), "--batch-size", "8"]
    printed = read(stock("fairseq-eval-lm", data, checkpoint, split, flags, log))
    if "Evaluated 0 tokens" in printed:
        raise ResultError(f"{log}: nothing was evaluated; is --context longer than the model's?")
    return {"perplexity": float(re.findall(r"Perplexity: ([\d.]+)", printed)[-1])}


TASKS = {"lm": language_model, "mt": translation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path, help="folder of data-prep")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--beam", type=int, default=5, help="of translation")
    parser.add_argument("--context", type=int, default=128, help="tokens per sample of a language model")
    args = parser.parse_args()
    run = TASKS[args.task]
    splits = sorted({path.name.split(".")[0] for path in (args.data / "bin").glob("test*.idx")})
    if not splits:
        raise SystemExit(f"score_conversions: DATA must hold bin/test*.idx, got {args.data}")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    try:
        for checkpoint in args.checkpoints:
            if not checkpoint.is_file():
                raise ResultError(f"CHECKPOINT {checkpoint}: No such file")
            name = checkpoint.parent.name if checkpoint.stem == "checkpoint_last" else checkpoint.stem
            if name in results:
                raise ResultError(f"two checkpoints are called {name}: the second is {checkpoint}")
            for split in splits:
                found = run(args.data, checkpoint, split, args, args.out / f"{name}.{split}.out")
                results.setdefault(name, {}).update({f"{split} {key}": n for key, n in found.items()})
    except ResultError as error:
        raise SystemExit(f"score_conversions: {error}") from None
    titles = [*results[next(iter(results))]]
    rows = [[name, *(f"{found[title]:.2f}" for title in titles)] for name, found in results.items()]
    table = markdown(["checkpoint", *titles], rows)
    print(table, end="")
    write(args.out / "scores.md", table)
    write_json(args.out / "scores.json", results)


if __name__ == "__main__":
    main()
