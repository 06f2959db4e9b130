"""The end of scripts/{wmt,lm}/run.sh: a table of the models in its folder, and what to do with the new one.

    python scripts/run.py experiments.own_report OUT RUN

Reads what train.py and score.py have left in OUT's folders; writes OUT/report.md and report.json.
"""

import math
import shlex
import sys
from pathlib import Path
from typing import Any

from experiments.catalogue import LanguageModelPreset, TranslationPreset
from experiments.evaluation import hypotheses
from experiments.plan import Plan
from experiments.results import lines, publish, read_json, read_run
from experiments.runs import FLOPS, load
from experiments.train import ROOT, languages
from xmoe_fairseq.tables import markdown

# With their digits.
COLUMNS = {"wmt": {"test BLEU": 1, "test chrF++": 1}, "lm": {"test ppl": 2, "test ppl/word": 2}}
COST = {"experts/token": 2, FLOPS: 2, "training seconds": 0}
FEW = 100  # pairs: below, BLEU of the same model differs by many points from set to set
FEW_WORDS = 2000
MISSED = 0.1  # share of a budget, by which the experts per token may differ from it unsaid


def row(run: Path, columns: dict[str, int]) -> list[str]:
    values = load(run, "best").values
    return [run.name] + [
        "-" if math.isnan(values[name]) else f"{values[name]:,.{digits}f}" for name, digits in columns.items()
    ]


def example(run: Path, data: Path) -> str:
    """The test pair in the middle."""
    source, target = languages(data / "bin")
    text = {side: lines(data / "text" / f"test.{side}") for side in (source, target)}
    translated = hypotheses(run / "score.best/test.out")
    middle = len(translated) // 2
    few = f"\nThe test set has {len(translated)} pairs; of so few a score says little.\n"
    return (
        f"{few if len(translated) < FEW else ''}\n    source       {text[source][middle]}\n"
        f"    reference    {text[target][middle]}\n    translation  {translated[middle]}\n"
    )


def remarks(run: Path, target: Any) -> str:
    """What the numbers of a run do not say by themselves."""
    values, said = load(run, "best").values, []
    words = read_json(run / "scores.best.json")["splits"]["test"].get("words", FEW_WORDS)
    if words < FEW_WORDS:
        said.append(f"The test set has {words:,} words; of so few a perplexity says little.")
    taken = values["experts/token"]
    if target and abs(taken - target) > MISSED * target:
        said.append(
            f"The budget is {target:g} experts per token; on the test set the best checkpoint takes"
            f" {taken:.2f}: thresholds settle in some hundred updates, and other text takes other numbers."
        )
    return "".join(f"\n{line}\n" for line in said)


def commands(run: Path, data: Path, plan: Plan) -> str:
    """What to type next."""

    def words(*each: object) -> str:
        return shlex.join(map(str, each))

    best = run / "checkpoint_best.pt"
    model = (data / "bin", "--user-dir", "xmoe_fairseq", "--path", best, *["--cpu"] * plan.on_cpu)
    pieces = ("--bpe", "sentencepiece", "--sentencepiece-model", data / "spm.model")
    normalize = words("python", ROOT / "data-prep/normalize.py")
    use = ""
    if isinstance(plan.size, TranslationPreset):
        source, target = languages(data / "bin")
        search = ("--beam", plan.size.beam, "--buffer-size", 64, "--max-tokens", 4000)
        interactive = words("fairseq-interactive", *model, *pieces, "-s", source, "-t", target, *search)
        use = f"translate:      {normalize} FILE | {interactive} | grep ^D- | cut -f 3"
    elif isinstance(plan.size, LanguageModelPreset):
        flags = ("--gen-subset", "test", "--tokens-per-sample", plan.size.sample_tokens, "--max-tokens", 4000)
        use = f"perplexity:     {words('fairseq-eval-lm', *model, *flags)}"
    said = [
        f"checkpoint:     {best}",
        f"report:         {run.parent / 'report.md'}",
        f"next, after     . {shlex.quote(sys.prefix)}/bin/activate",
        use,
    ]
    if plan.method.flags.get("moe-router") == "threshold":
        found = words("xmoe-threshold", best, "--data", data, "--budget", 1.5)
        said.append(f"fewer experts:  {found}")
    if not plan.is_dense:
        said.append("the dense FFN:  the same command with --model dense; it becomes a line of the table")
    return "\n".join([*said, ""])


def main() -> None:
    out, run = map(Path, sys.argv[1:])
    about: dict[str, Any] = read_run(run)
    data, plan = Path(about["data"]), Plan.of_run(about)
    runs = [path.parent for path in sorted(out.glob("*/scores.best.json"))]
    columns = COLUMNS[plan.task] | COST
    titles, rows = ["model", *columns], [row(each, columns) for each in runs]
    shown = remarks(run, plan.method.flags.get("moe-target-experts-per-token"))
    shown += example(run, data) if plan.task == "wmt" else ""
    content = [dict(zip(titles, cells, strict=True)) for cells in rows]
    publish(out / "report", markdown(titles, rows) + shown, content)
    print("\n" + commands(run, data, plan), end="")


if __name__ == "__main__":
    main()
