"""Scores a run of train.py with the stock commands, on validation and test sets; writes RUN/scores.best.json.

    bash scripts/wmt|lm/score.sh RUN [--average N | --checkpoint best|last|FILE.pt] [--splits SPLIT ...]

Translation: BLEU, chrF++ and chrF of detokenised text with sacreBLEU, and perplexity per piece.
Language models: perplexity per token, and per word (a word is what stands between white space, and the end of
each line, which is a token too). Both: experts per token and MoE FLOPs. The checkpoint is the best; or the
mean of the last N, whose scores are scores.averageN.json; or another, whose scores are called as it is. Of a
model with experts also RUN/explain.best.html: which of them the tokens of the first set take.
"""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from experiments.catalogue import TASKS, LanguageModelPreset, TranslationPreset
from experiments.evaluation import call, hypotheses, last_number, score
from experiments.explain import write_page
from experiments.plan import LENGTHS, Plan
from experiments.results import lines, read_run, record, write_json
from experiments.train import ROOT, languages
from xmoe_fairseq_compat.errors import UserError

METRICS = ("bleu", "chrf++", "chrf")


class Scorer:
    """Runs the stock commands for one checkpoint of a run; what they print is kept in RUN/score.TAG/."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.run, self.task, self.splits = args.run.resolve(), args.task, args.splits
        self.generate = shlex.split(args.generate)
        if not (self.run / "run.json").exists():
            raise UserError(
                f"RUN must be a folder of scripts/{self.task}/train.sh, with run.json, got {self.run}"
            )
        about = read_run(self.run)
        if about["task"] != self.task:
            raise UserError(f"{self.run} is a run of {about['task']}, not of {self.task}")
        self.data, self.plan = Path(about["data"]), Plan.of_run(about)
        self.checkpoint = self.run / f"checkpoint_{args.checkpoint}.pt"
        if args.average:
            self.checkpoint = self.run / f"checkpoint_average{args.average}.pt"
        elif args.checkpoint.endswith(".pt"):
            self.checkpoint = Path(args.checkpoint).resolve()
        self.tag = self.checkpoint.stem.removeprefix("checkpoint_")
        if args.average:
            self.average(args.average)
        if not self.checkpoint.exists():
            raise UserError(f"{self.checkpoint}: No such file; has the run been validated yet?")
        self.folder = self.run / f"score.{self.tag}"
        self.folder.mkdir(exist_ok=True)

    def average(self, number: int) -> None:
        """The mean of the last checkpoints by epoch or, where there are none, by update."""
        most = 0
        for pattern in (r"checkpoint(\d+)\.pt", r"checkpoint_\d+_(\d+)\.pt"):
            found = [(int(m[1]), p) for p in self.run.glob("*.pt") if (m := re.fullmatch(pattern, p.name))]
            if len(found) >= number > 0:
                break
            most = max(most, len(found))
        else:
            few = f"{self.run} holds {most} checkpoints, too few for --average {number}"
            raise UserError(f"{few}; leave it out to score the best one")
        from experiments.average_checkpoints import write_average  # takes five seconds

        write_average([path for _, path in sorted(found)[-number:]], self.checkpoint)

    def fairseq(self, tool: str, log: str, *flags: object) -> Path:
        common = ("--user-dir", ROOT / "xmoe_fairseq", "--path", self.checkpoint, "--num-workers", 0)
        device = ["--cpu"] if self.plan.on_cpu else []
        return call([tool, self.data / "bin", *common, *device, *flags], self.folder / log)

    def validate(self, splits: list[str], *flags: object) -> dict[str, dict[str, Any]]:
        """What the criterion logs for each split."""
        subsets = ("--valid-subset", ",".join(splits), "--log-format", "json")
        log = self.fairseq("fairseq-validate", "validate.log", *subsets, *flags)
        return {split: record(log, split) for split in splits}


def routing_of(stats: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of the sides that have experts: experts per token, and MoE FLOPs over the dense FFN's."""
    names = {"experts": "experts_per_token", "flops": "flops_vs_dense_ffn"}
    return {
        side: {key: stats[f"moe_{side}_{name}"] for key, name in names.items()}
        for side in ("encoder", "decoder")
        if f"moe_{side}_experts_per_token" in stats
    }


def score_translation(run: Scorer, size: TranslationPreset) -> dict[str, Any]:
    source, target = languages(run.data / "bin")
    paths = (run.data / "bin").glob(f"*.{source}-{target}.{target}.idx")
    splits = run.splits or sorted({path.name.split(".")[0] for path in paths} - {"train"})
    side = ("--source-lang", source, "--target-lang", target, "--max-tokens", run.plan.batch_tokens)
    # The checkpoint says --eval-bleu: once is enough.
    stats = run.validate(splits, "--task", "translation", *side, "--model-overrides", "{'eval_bleu': False}")
    lengths = [word for name, value in LENGTHS.items() for word in ("--" + name.replace("_", "-"), value)]
    search = ("--beam", size.beam, "--remove-bpe", "sentencepiece", *lengths, *run.generate)
    results: dict[str, Any] = {}
    signatures: dict[str, str] = {}
    for split in splits:
        output = run.fairseq("fairseq-generate", f"{split}.out", "--gen-subset", split, *side, *search)
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
    usage = __doc__.splitlines()[2].strip()
    parser = argparse.ArgumentParser(prog="score", usage=usage, description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("run", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--average", type=int, metavar="N", help="the mean of the last N checkpoints")
    which.add_argument("--checkpoint", default="best", help="best, last or a file (default: best)")
    parser.add_argument("--splits", nargs="+", default=[], metavar="SPLIT", help="default: all but train")
    parser.add_argument("--generate", default="", metavar="FLAGS", help="of fairseq-generate, as one word")
    parser.add_argument("--no-page", action="store_true", help="leave out RUN/explain.TAG.html")
    args = parser.parse_args()
    if args.generate and args.task == "lm":
        parser.error("--generate goes with translation")
    run = Scorer(args)
    size: Any = run.plan.size
    scores = (score_translation if args.task == "wmt" else score_language_model)(run, size)
    path = run.run / f"scores.{run.tag}.json"
    write_json(path, {"task": run.task, "checkpoint": run.checkpoint.name, **scores})
    for split, values in scores["splits"].items():
        numbers = ", ".join(f"{key} {value:.2f}" for key, value in values.items() if isinstance(value, float))
        print(f"[score] {split}: {numbers}")
    print(f"[score] {path}")
    split, values = next(iter(scores["splits"].items()))
    if values["routing"] and not args.no_page:  # it has experts
        write_page(run.checkpoint, str(run.data), split, run.run / f"explain.{run.tag}.html")


if __name__ == "__main__":
    main()
