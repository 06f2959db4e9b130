"""Scores a run of train.py with the stock commands, on validation and test sets; writes RUN/scores.best.json.

    python scripts/tools/score.py wmt|lm RUN [--average N] [--splits SPLIT ...]

Translation: BLEU, chrF++ and chrF of detokenised text with sacreBLEU, and perplexity per piece.
Language models: perplexity per token, and per word (a word is what stands between white space, and the end of
each line, which is a token too). Both: experts per token and MoE FLOPs. The checkpoint is the best, or the
mean of the last N, whose scores are scores.averageN.json.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from plan import Plan
from presets import LENGTHS, PRESETS
from results import ResultError, hypotheses, lines, read, record, routing, score, write_json
from train import ROOT, languages

METRICS = ("bleu", "chrf++", "chrf")
SIDES = ("encoder", "decoder")


class Scorer:
    """Runs the stock commands for one checkpoint of a run; what they print is kept in RUN/score.TAG/."""

    def __init__(self, run: Path, task: str, average: int, splits: list[str]) -> None:
        if not (run / "run.json").exists():
            raise ResultError(f"RUN must be a folder of scripts/{task}/train.sh, with run.json, got {run}")
        about = json.loads(read(run / "run.json"))
        if about["task"] != task:
            raise ResultError(f"{run} is a run of {about['task']}, not of {task}")
        self.run, self.task, self.data = run, task, Path(about["data"])
        self.plan = Plan(task, about["preset"], about["model"], 1)
        self.splits = splits
        self.tag = f"average{average}" if average else "best"
        self.folder = run / f"score.{self.tag}"
        self.folder.mkdir(exist_ok=True)
        self.checkpoint = self.mean_of_last(average) if average else run / "checkpoint_best.pt"
        if not self.checkpoint.exists():
            raise ResultError(f"{self.checkpoint}: No such file; has the run been validated yet?")
        self.where = ["--user-dir", str(ROOT / "xmoe_fairseq"), "--path", str(self.checkpoint)]
        if self.plan.size.on_cpu:
            self.where += ["--cpu", "--num-workers", "0"]

    def mean_of_last(self, number: int) -> Path:
        """Of checkpoints by epoch or, where there are none, by update."""
        for pattern in (r"checkpoint(\d+)\.pt", r"checkpoint_\d+_(\d+)\.pt"):
            found = [(int(m[1]), p) for p in self.run.glob("*.pt") if (m := re.fullmatch(pattern, p.name))]
            if len(found) >= number:
                break
        else:
            raise ResultError(f"{self.run} holds fewer than {number} checkpoints to average")
        inputs = [str(path) for _, path in sorted(found)[-number:]]
        mean = self.run / f"checkpoint_average{number}.pt"
        tool = str(ROOT / "scripts/tools/average_checkpoints.py")
        self.call([sys.executable, tool, "--inputs", *inputs, "--output", str(mean)], "average.log")
        return mean

    def call(self, words: list[str], log: str) -> Path:
        """Runs a command; its output is the file that is returned."""
        print(f"[score] {shlex.join(words)}", flush=True)
        path = self.folder / log
        with path.open("w", encoding="utf-8") as file:
            status = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
        if status:
            raise ResultError(f"{Path(words[0]).name} failed: {lines(path)[-1]} (all of it: {path})")
        return path

    def fairseq(self, tool: str, log: str, *flags: object) -> Path:
        command = [str(Path(sys.executable).parent / tool), str(self.data / "bin"), *self.where]
        return self.call([*command, *map(str, flags)], log)

    def validate(self, splits: list[str], *flags: object) -> dict[str, dict[str, Any]]:
        """What the criterion logs for each split."""
        subsets = ("--valid-subset", ",".join(splits), "--log-format", "json")
        log = self.fairseq("fairseq-validate", "validate.log", *subsets, *flags)
        return {split: record(log, split) for split in splits}


def routing_of(stats: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of the sides that have experts."""
    sides = {side: routing(stats, side) for side in SIDES if f"moe_{side}_experts_per_token" in stats}
    return {side: {"experts": experts, "flops": flops} for side, (experts, flops) in sides.items()}


def score_translation(run: Scorer) -> dict[str, Any]:
    source, target = languages(run.data / "bin")
    splits = sorted(
        p.name.split(".")[0] for p in (run.data / "bin").glob(f"*.{source}-{target}.{target}.idx")
    )
    splits = run.splits or [split for split in splits if split != "train"]
    side = ("--source-lang", source, "--target-lang", target, "--max-tokens", run.plan.batch)
    # The checkpoint says --eval-bleu: once is enough.
    stats = run.validate(splits, "--task", "translation", *side, "--model-overrides", "{'eval_bleu': False}")
    search = ["--beam", run.plan.size.beam, "--remove-bpe", "sentencepiece"]
    for name, value in LENGTHS.items():
        search += ["--" + name.replace("_", "-"), value]
    results, signatures = {}, {}
    for split in splits:
        output = run.fairseq("fairseq-generate", f"{split}.out", "--gen-subset", split, *side, *search)
        reference = lines(run.data / "text" / f"{split}.{target}")
        scores, signatures = score(hypotheses(output), reference, METRICS)
        perplexity = 2 ** stats[split]["nll_loss"]
        results[split] = scores | {"perplexity": perplexity, "routing": routing_of(stats[split])}
    return {"splits": results, "signatures": signatures}


def words_of(text: Path, printed: str) -> int:
    """Words and ends of lines in a text, of which `printed` is the score.

    Raises:
        ResultError: fairseq-eval-lm has read other data.
    """
    found = lines(text)
    loaded = int(re.findall(r"loaded ([\d,]+) examples", printed)[-1].replace(",", ""))
    if loaded != len(found):
        raise ResultError(f"{text} has {len(found)} lines, its binarised data {loaded}: binarise it again")
    return sum(len(line.split()) + 1 for line in found)


def score_language_model(run: Scorer) -> dict[str, Any]:
    size, splits = run.plan.size, run.splits or ["valid", "test"]
    rows = run.plan.batch // size.context
    stats = run.validate(splits, "--task", "language_modeling", "--batch-size", rows)
    results: dict[str, Any] = {}
    for split in splits:
        window = ("--tokens-per-sample", size.context, "--context-window", size.seen, "--batch-size", rows)
        printed = read(run.fairseq("fairseq-eval-lm", f"{split}.out", "--gen-subset", split, *window))
        tokens = int(re.findall(r"Evaluated ([\d,]+) tokens", printed)[-1].replace(",", ""))
        bits = float(re.findall(r"Loss \(base 2\): ([\d.]+)", printed)[-1]) * tokens
        words = words_of(run.data / "text" / f"docs.{split}", printed)
        results[split] = {
            "perplexity": 2 ** (bits / tokens), "perplexity_per_word": 2 ** (bits / words), "tokens": tokens,
            "words": words, "routing": routing_of(stats[split]),
        }  # fmt: skip
    return {"splits": results, "context": f"{size.context} tokens, of these {size.seen} or more seen before"}


def main() -> None:
    usage = "bash scripts/wmt|lm/score.sh RUN [--average N] [--splits SPLIT ...]"
    parser = argparse.ArgumentParser(prog="score", usage=usage, description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=PRESETS)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--average", type=int, default=0, metavar="N", help="the mean of the last N checkpoints"
    )
    parser.add_argument("--splits", nargs="+", default=[], metavar="SPLIT", help="default: all but train")
    args = parser.parse_args()
    try:
        run = Scorer(args.run.resolve(), args.task, args.average, args.splits)
        scores = score_translation(run) if args.task == "wmt" else score_language_model(run)
    except ResultError as error:
        raise SystemExit(f"score: {error}") from None
    path = run.run / f"scores.{run.tag}.json"
    write_json(path, {"task": run.task, "checkpoint": run.checkpoint.name, **scores})
    for split, values in scores["splits"].items():
        numbers = ", ".join(f"{key} {value:.2f}" for key, value in values.items() if isinstance(value, float))
        print(f"[score] {split}: {numbers}")
    print(f"[score] {path}")


if __name__ == "__main__":
    main()
