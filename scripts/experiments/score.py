"""Scores a run of train.py with the stock commands, on validation and test sets; writes RUN/scores.best.json.

    bash scripts/wmt|lm/score.sh RUN [--average N] [--splits SPLIT ...]

Translation: BLEU, chrF++ and chrF of detokenised text with sacreBLEU, and perplexity per piece.
Language models: perplexity per token, and per word (a word is what stands between white space, and the end of
each line, which is a token too). Both: experts per token and MoE FLOPs. The checkpoint is the best, or the
mean of the last N, whose scores are scores.averageN.json.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from experiments.catalogue import TASKS, LanguageModelPreset, TranslationPreset
from experiments.evaluation import call, hypotheses, last_number, of_checkpoint, score, search
from experiments.plan import Plan
from experiments.results import lines, read_run, record, routing, write_json
from experiments.train import ROOT, languages
from xmoe_fairseq_compat.errors import UserError

METRICS = ("bleu", "chrf++", "chrf")
SIDES = ("encoder", "decoder")


class Scorer:
    """Runs the stock commands for one checkpoint of a run; what they print is kept in RUN/score.TAG/."""

    def __init__(self, run: Path, task: str, average: int, splits: list[str]) -> None:
        if not (run / "run.json").exists():
            raise UserError(f"RUN must be a folder of scripts/{task}/train.sh, with run.json, got {run}")
        about = read_run(run)
        if about["task"] != task:
            raise UserError(f"{run} is a run of {about['task']}, not of {task}")
        self.run, self.task, self.data = run, task, Path(about["data"])
        self.plan = Plan(task, about["preset"], about["model"])
        self.splits = splits
        self.tag = f"average{average}" if average else "best"
        self.folder = run / f"score.{self.tag}"
        self.folder.mkdir(exist_ok=True)
        self.checkpoint = self.mean_of_last(average) if average else run / "checkpoint_best.pt"
        if not self.checkpoint.exists():
            raise UserError(f"{self.checkpoint}: No such file; has the run been validated yet?")

    def mean_of_last(self, number: int) -> Path:
        """Of checkpoints by epoch or, where there are none, by update."""
        for pattern in (r"checkpoint(\d+)\.pt", r"checkpoint_\d+_(\d+)\.pt"):
            found = [(int(m[1]), p) for p in self.run.glob("*.pt") if (m := re.fullmatch(pattern, p.name))]
            if len(found) >= number:
                break
        else:
            raise UserError(f"{self.run} holds fewer than {number} checkpoints to average")
        inputs = [path for _, path in sorted(found)[-number:]]
        mean = self.run / f"checkpoint_average{number}.pt"
        tool = (sys.executable, ROOT / "scripts/run.py", "experiments.average_checkpoints")
        call([*tool, "--inputs", *inputs, "--output", mean], self.folder / "average.log")
        return mean

    def fairseq(self, tool: str, log: str, *flags: object) -> Path:
        device = ["--cpu"] if self.plan.size.cpu else []
        return call([*of_checkpoint(tool, self.data, self.checkpoint), *device, *flags], self.folder / log)

    def validate(self, splits: list[str], *flags: object) -> dict[str, dict[str, Any]]:
        """What the criterion logs for each split."""
        subsets = ("--valid-subset", ",".join(splits), "--log-format", "json")
        log = self.fairseq("fairseq-validate", "validate.log", *subsets, *flags)
        return {split: record(log, split) for split in splits}


def routing_of(stats: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of the sides that have experts."""
    sides = {side: routing(stats, side) for side in SIDES if f"moe_{side}_experts_per_token" in stats}
    return {side: {"experts": experts, "flops": flops} for side, (experts, flops) in sides.items()}


def score_translation(run: Scorer, size: TranslationPreset) -> dict[str, Any]:
    source, target = languages(run.data / "bin")
    paths = (run.data / "bin").glob(f"*.{source}-{target}.{target}.idx")
    splits = run.splits or sorted({path.name.split(".")[0] for path in paths} - {"train"})
    side = ("--source-lang", source, "--target-lang", target, "--max-tokens", run.plan.batch_tokens)
    # The checkpoint says --eval-bleu: once is enough.
    stats = run.validate(splits, "--task", "translation", *side, "--model-overrides", "{'eval_bleu': False}")
    results: dict[str, Any] = {}
    signatures: dict[str, str] = {}
    for split in splits:
        output = run.fairseq(
            "fairseq-generate", f"{split}.out", "--gen-subset", split, *side, *search(size.beam)
        )
        reference = lines(run.data / "text" / f"{split}.{target}")
        scores, signatures = score(hypotheses(output), reference, METRICS)
        perplexity = 2 ** stats[split]["nll_loss"]
        results[split] = scores | {"perplexity": perplexity, "routing": routing_of(stats[split])}
    return {"splits": results, "signatures": signatures}


def words_of(text: Path, loaded: float) -> int:
    """Words and ends of lines in a text, of which fairseq-eval-lm has loaded so many lines.

    Raises:
        UserError: it has read other data.
    """
    found = lines(text)
    if loaded != len(found):
        raise UserError(f"{text} has {len(found)} lines, its binarised data {loaded:.0f}: binarise it again")
    return sum(len(line.split()) + 1 for line in found)


def score_language_model(run: Scorer, size: LanguageModelPreset) -> dict[str, Any]:
    splits = run.splits or ["valid", "test"]
    rows = run.plan.batch_tokens // size.sample_tokens
    window = ("--tokens-per-sample", size.sample_tokens, "--context-window", size.seen_tokens)
    stats = run.validate(splits, "--task", "language_modeling", "--batch-size", rows)
    results: dict[str, Any] = {}
    for split in splits:
        flags = ("--gen-subset", split, *window, "--batch-size", rows)
        printed = run.fairseq("fairseq-eval-lm", f"{split}.out", *flags)
        tokens = int(last_number(printed, "Evaluated"))
        bits = last_number(printed, "Loss (base 2):") * tokens
        words = words_of(run.data / "text" / f"docs.{split}", last_number(printed, "loaded"))
        results[split] = {
            "perplexity": 2 ** (bits / tokens), "perplexity_per_word": 2 ** (bits / words), "tokens": tokens,
            "words": words, "routing": routing_of(stats[split]),
        }  # fmt: skip
    about = f"{size.sample_tokens} tokens, of these {size.seen_tokens} or more seen before"
    return {"splits": results, "context": about}


def main() -> None:
    usage = "bash scripts/wmt|lm/score.sh RUN [--average N] [--splits SPLIT ...]"
    parser = argparse.ArgumentParser(prog="score", usage=usage, description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--average", type=int, default=0, metavar="N", help="the mean of the last N checkpoints"
    )
    parser.add_argument("--splits", nargs="+", default=[], metavar="SPLIT", help="default: all but train")
    args = parser.parse_args()
    run = Scorer(args.run.resolve(), args.task, args.average, args.splits)
    size: Any = run.plan.size
    scores = (score_translation if args.task == "wmt" else score_language_model)(run, size)
    path = run.run / f"scores.{run.tag}.json"
    write_json(path, {"task": run.task, "checkpoint": run.checkpoint.name, **scores})
    for split, values in scores["splits"].items():
        numbers = ", ".join(f"{key} {value:.2f}" for key, value in values.items() if isinstance(value, float))
        print(f"[score] {split}: {numbers}")
    print(f"[score] {path}")


if __name__ == "__main__":
    main()
