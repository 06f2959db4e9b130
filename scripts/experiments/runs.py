"""Runs of train.py that score.py has scored: what their files say, by the columns of a table."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.catalogue import models
from experiments.plan import Plan
from experiments.results import median_seconds, parameters, read, read_json, read_run, records
from xmoe_fairseq_compat.errors import FlagError, UserError

SHOWN = {"wmt": ("bleu", "chrf++", "perplexity"), "lm": ("perplexity", "perplexity_per_word")}
TITLES = {"bleu": "BLEU", "chrf++": "chrF++", "perplexity": "ppl", "perplexity_per_word": "ppl/word"}
EXPERTS, FLOPS = "experts/token", "MoE FLOPs / dense FFN"
MAX_VIOLATION, DEAD = "max violation", "dead experts, %"
FFN_SECONDS, UPDATE = "FFN seconds / the first's", "update / the first's"
DECODING, SENTENCE = "decoded token / the first's", "translated sentence / the first's"
MS_UPDATE, MS_DECODING, MS_SENTENCE = "ms/update", "ms/decoded token", "ms/sentence"
TRAINING_SECONDS = "training seconds"
NAN = math.nan  # what is not known of a run


@dataclass(frozen=True)
class Run:
    folder: Path
    about: dict[str, Any]  # run.json
    values: dict[str, float]  # by column

    @property
    def name(self) -> str:
        """Of the row, but for the preset: runs of one name differ in the seed alone."""
        return " ".join([self.about["model"], *self.about["flags"]])

    @property
    def seed(self) -> int:
        return int(self.about["seed"])


Rows = Mapping[str, Sequence[Run]]


def load(folder: Path, tag: str = "best", split: str = "test") -> Run:
    """
    Args:
        tag: of scores.TAG.json.
        split: whose routing is shown.
    """
    about, scores = read_run(folder), folder / f"scores.{tag}.json"
    splits = read_json(scores)["splits"]
    if split not in splits:
        raise UserError(f"{scores}: holds no {split}; score the run again without --splits")
    values = {
        f"{name} {TITLES[key]}": result[key]
        for name, result in splits.items()
        for key in SHOWN[about["task"]]
    }
    plan = Plan.of_run(about)
    values |= costs(plan, [*splits[split]["routing"].values()]) | loads(folder) | timings(folder)
    return Run(folder, about, values | training(folder / "train.log"))


def load_all(folders: Sequence[Path], tag: str = "best", split: str = "test") -> list[Run]:
    """Raises UserError: they are not of one task on the same data, or one is not scored."""
    try:
        return alike([load(folder, tag, split) for folder in folders])
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: {error.strerror}; train and score each run first") from None


def alike(runs: list[Run]) -> list[Run]:
    """Raises UserError: they are not of one task on the same data."""
    for key, what in (("task", "one task"), ("data", "the same data")):
        found = sorted({run.about[key] for run in runs})
        if len(found) > 1:
            raise UserError(f"runs must be of {what} to be compared, got {', '.join(found)}")
    return runs


def costs(plan: Plan, sides: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of the sides that have experts."""
    if not sides:
        return {EXPERTS: NAN, FLOPS: plan.ffn_dim / plan.size.ffn_dim}
    return {
        title: statistics.mean(side[key] for side in sides)
        for title, key in ((EXPERTS, "experts"), (FLOPS, "flops"))
    }


def loads(folder: Path) -> dict[str, float]:
    """Of the text of the last validation: the layers' means."""
    file = folder / "moe_load.jsonl"
    lines = read(file).splitlines() if file.exists() else []
    layers = [*json.loads(lines[-1])["layers"].values()] if lines else []
    if not layers:
        return {MAX_VIOLATION: NAN, DEAD: NAN}
    dead = statistics.mean(layer["dead_experts"] / len(layer["rows"]) for layer in layers)
    return {MAX_VIOLATION: statistics.mean(layer["max_violation"] for layer in layers), DEAD: 100 * dead}


def timings(folder: Path) -> dict[str, float]:
    """What benchmark_checkpoints.sh and benchmarks.trained_models have noted."""
    titles = (FFN_SECONDS, UPDATE, DECODING, SENTENCE, MS_UPDATE, MS_DECODING, MS_SENTENCE)
    values = dict.fromkeys(titles, NAN)
    if (seconds := folder / "seconds.json").exists():
        values[FFN_SECONDS] = read_json(seconds)["ratio"]
    if (speed := folder / "speed.json").exists():
        found = read_json(speed)
        for what, ratio, milliseconds, count in (
            ("update", UPDATE, MS_UPDATE, 1),
            ("decoding", DECODING, MS_DECODING, found["tokens decoded"]),
            ("translation", SENTENCE, MS_SENTENCE, found.get("sentences translated")),
        ):
            if what in found:
                values |= {ratio: found[what]["ratio"], milliseconds: found[what]["milliseconds"] / count}
    return values


def training(log: Path) -> dict[str, float]:
    logged = [one for group in ("valid", "train_inner", "train") for one in records(log, group)]
    updates = max((one["num_updates"] for one in logged if "num_updates" in one), default=NAN)
    seconds = median_seconds(log)
    return {
        "updates": updates, TRAINING_SECONDS: updates * seconds, "s/update": seconds,
        "parameters (M)": parameters(log) / 1e6,
    }  # fmt: skip


def rows_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by row, in the order of models.toml."""
    found: dict[tuple[str, str], list[Run]] = {}
    order = list(models())
    for run in sorted(runs, key=lambda r: (r.about["preset"], order.index(r.about["model"]))):
        found.setdefault((run.about["preset"], run.name), []).append(run)
    many = len({preset for preset, _ in found}) > 1
    return {f"{preset} {name}" if many else name: members for (preset, name), members in found.items()}


def row_named(flag: str, name: str, rows: Rows) -> Sequence[Run]:
    """Raises FlagError."""
    if name not in rows:
        raise FlagError(f"{flag} must be one of {'; '.join(rows)}, got {name}")
    return rows[name]


def known(members: Sequence[Run], column: str) -> list[float]:
    """The runs' values, without those that are not."""
    return [value for run in members if not math.isnan(value := run.values[column])]


def changes(members: Sequence[Run], reference: Sequence[Run], column: str) -> list[float]:
    """From the reference's run with the same seed: per cent of a perplexity, points of a score."""
    bases = {run.seed: run.values[column] for run in reference}
    pairs = [(run.values[column], bases[run.seed]) for run in members if run.seed in bases]
    return [100 * (own / base - 1) if column.endswith("ppl") else own - base for own, base in pairs]
