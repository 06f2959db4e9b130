"""How long a training of scripts/{wmt,lm}/run.sh will be, and how long it will take here.

    python scripts/run.py experiments.estimate time TASK PRESET MODEL DATA OUT.json
    python scripts/run.py experiments.estimate tell TASK PRESET MODEL DATA OUT.json RUN [UPDATES]

The first does some updates and a validation, and notes their seconds. The second says what will be done, and
writes the flags of fairseq-train for it to descriptor 3.
"""

import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from experiments import processes, train
from experiments.catalogue import LanguageModelPreset
from experiments.counts import Counts
from experiments.own_text import tell_shell
from experiments.plan import Plan
from experiments.results import lines, parameters, read, read_json, write_json
from xmoe_fairseq_compat.errors import UserError

# Choices. The best checkpoint is kept, so a few passes too many cost time alone.
PASSES = {"wmt": 20, "lm": 10}  # over the training text, if the preset's updates are enough for them
TIMED_UPDATES, TIMED_HOURS = 20, 0.02  # whichever is first
SCORING_COMMANDS = 2  # of fairseq, each of which starts anew


def timed(words: list[str], log: Path) -> dict[str, float]:
    """Runs fairseq-train with a log line an update and a validation at the end; seconds of each."""
    began = time.monotonic()
    updates, validation = [], [began, began]

    with log.open("w", encoding="utf-8") as file:

        def look(line: str) -> None:
            file.write(line)
            if "| train_inner |" in line:
                updates.append(time.monotonic())
            elif "begin validation on" in line:
                validation[0] = time.monotonic()
            elif "| valid |" in line:
                validation[1] = time.monotonic()

        status = processes.run(words, look)
    if status or len(updates) < 2:
        raise UserError(f"fairseq-train failed: {lines(log)[-1]} (all of it: {log})")
    seconds = [after - before for before, after in zip(updates, updates[1:], strict=False)]
    return {
        "start": updates[0] - began, "update": statistics.median(seconds), "updates": len(updates),
        "validation": validation[1] - validation[0], "parameters": parameters(log),
    }  # fmt: skip


def tell_of_gpus(plan: Plan) -> None:
    import torch  # takes two seconds

    if plan.on_cpu and torch.cuda.is_available():
        print(f"[run] preset {plan.preset} leaves the GPU alone; small is for it (or GPUS=1)", flush=True)


def measure(plan: Plan, data: Path, out: Path) -> None:
    tell_of_gpus(plan)
    limits = ["--max-update", str(TIMED_UPDATES), "--stop-time-hours", str(TIMED_HOURS)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        words = train.command(plan, data, Path(folder), 1, [*limits, "--no-save", "--log-interval", "1"])
        write_json(out, timed(words, out.with_suffix(".log")))


def updates_of(plan: Plan, tokens: int, asked: int | None) -> int:
    """As asked for, else PASSES over the text, but at most the preset's."""
    flags, each = plan.size.flags, plan.size.update_tokens
    most = int(flags.get("max-update") or int(flags["max-epoch"]) * tokens // each)
    return asked or max(1, min(most, PASSES[plan.task] * tokens // each))


def flags_for(plan: Plan, updates: int) -> dict[str, int]:
    """What another number of updates than the preset's asks for: its schedule, shorter."""
    flags = plan.size.flags
    own = int(flags.get("max-update", 0))
    if updates == own:
        return {}
    length = {"max-update": updates} | ({"total-num-update": updates} if "total-num-update" in flags else {})
    scaled = ("warmup-updates", "save-interval-updates", "log-interval") if updates < own else ()
    shorter = {name: max(1, int(flags[name]) * updates // own) for name in scaled}
    if interval := shorter.get("save-interval-updates"):
        shorter["validate-interval-updates"] = interval
    return length | shorter


def seconds_of(plan: Plan, text: Counts, timing: dict[str, float], updates: int, interval: int) -> float:
    size = plan.size
    validations = -(-updates // interval)
    test = timing["validation"] * text.tokens("test") / text.tokens("valid")
    passes = 2.0  # over the test set: fairseq-validate, then fairseq-generate
    if isinstance(size, LanguageModelPreset):
        passes = 1 + size.sample_tokens / (size.sample_tokens - size.seen_tokens)
    training = timing["start"] + updates * timing["update"] + validations * timing["validation"]
    return training + SCORING_COMMANDS * timing["start"] + passes * test


def done(run: Path) -> int:
    """Updates in the last checkpoint, as the log says."""
    if not (run / "checkpoint_last.pt").exists() or not (run / "train.log").exists():
        return 0
    saved = re.findall(r"Saved checkpoint .* \(epoch \d+ @ (\d+) updates", read(run / "train.log"))
    return int(saved[-1]) if saved else 0


def tell(plan: Plan, data: Path, timing: dict[str, float], run: Path, asked: int | None) -> None:
    text = Counts(plan.task, data)
    tokens, each = text.tokens("train"), plan.size.update_tokens
    updates = updates_of(plan, tokens, asked)
    flags = flags_for(plan, updates)
    before = min(done(run), updates)
    interval = int(flags.get("save-interval-updates", plan.size.flags.get("save-interval-updates", updates)))
    seconds = seconds_of(plan, text, timing, updates - before, interval)
    minutes = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    going_on = f", going on after {before:,}" if before else ""
    speed = f"{timing['updates']} updates took {timing['update']:.3f} s each just now"
    times = f"the text {updates * each / tokens:.1f} times"
    lasts = f"about {minutes} with scores, as {speed}; after a stop the same command goes on"
    for line in (
        f"text: {text.about()}",
        f"model: {plan.lines()[0]}; {timing['parameters']:,} parameters",
        f"training: {updates:,} updates{going_on} of at most {each:,} tokens, {times} (--updates N: others)",
        lasts if before < updates else "trained already; what is scored is not scored again",
    ):
        print(f"[run] {line}", flush=True)
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    tell_shell([("flags", words)])


def main() -> None:
    what, task, preset, model, *paths = sys.argv[1:]
    plan = train.plan_here(task, preset, model)
    data, timing = Path(paths[0]), Path(paths[1])
    if what == "time":
        measure(plan, data, timing)
    else:
        tell(plan, data, read_json(timing), Path(paths[2]), int(paths[3]) if paths[3:] else None)


if __name__ == "__main__":
    main()
