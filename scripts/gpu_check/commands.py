"""fairseq's commands on the device, in one process or on two ranks, with a deadline and a log."""

import json
import random
import re
import sys
import time
from pathlib import Path

from experiments import processes
from gpu_check.outcomes import Case, Failed

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DEADLINE = 300.0  # seconds for one command, which takes a tenth of them
RANKS = 2
PLUGIN = ("--user-dir", ROOT / "xmoe_fairseq")
LOADING = ("--num-workers", 0)
TESTED = 16  # sentences


def execute(words: list[str], log: Path) -> int:
    """Exit status; what it printed is in the log."""
    with log.open("w", encoding="utf-8") as file:
        return processes.run(words, lambda line: print(line, end="", file=file, flush=True), DEADLINE)


def run(
    case: Case, name: str, tool: str | Path, *arguments: object, ranks: int = 1, succeeds: bool = True
) -> str:
    """What a command printed. Raises Failed if its exit status is not what it should be."""
    log = case.work / f"{name.replace(' ', '-')}.log"
    torchrun = [BIN / "torchrun", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    start = time.monotonic()
    status = execute([str(word) for word in (*torchrun, BIN / tool, *arguments)], log)
    output = log.read_text(encoding="utf-8", errors="replace")
    if time.monotonic() - start > DEADLINE:
        raise Failed(f"{Path(tool).name} did not end within {DEADLINE:.0f} s (log: {log})")
    if (status == 0) != succeeds:
        last = (output.strip().splitlines() or ["nothing"])[-1][:200]
        raise Failed(f"{Path(tool).name} ended with status {status}: {last} (log: {log})")
    return output


def place(case: Case, ranks: int = 1) -> tuple[object, ...]:
    """fairseq's flags; by itself it would take all GPUs."""
    if case.device.type == "cpu":
        return ("--cpu", *(("--distributed-backend", "gloo") if ranks > 1 else ()))
    return ("--distributed-world-size", 1) if ranks == 1 else ()


def write_corpus(case: Case) -> Path:
    """Binarised pairs; German is English, word by word in upper case."""
    if (case.work / "bin" / "dict.en.txt").exists():
        return Path(case.work / "bin")
    rng, words, text = random.Random(5), [f"w{i}" for i in range(30)], case.work / "text"
    text.mkdir(parents=True, exist_ok=True)
    for split, lines in (("train", 160), ("valid", 16), ("test", TESTED)):
        said = "".join(" ".join(rng.choices(words, k=rng.randint(2, 9))) + "\n" for _ in range(lines))
        (text / f"{split}.en").write_text(said)
        (text / f"{split}.de").write_text(said.upper())
    prefixes = [f"--{split}pref={text / split}" for split in ("train", "valid", "test")]
    flags = ("-s", "en", "-t", "de", "--joined-dictionary", "--workers", 1, "--destdir", case.work / "bin")
    run(case, "preprocess", "fairseq-preprocess", *flags, *prefixes)
    return Path(case.work / "bin")


def logged(output: str, key: str) -> list[float]:
    """Of each update."""
    found = re.findall(r"\| train_inner \| (\{.*\})", output)
    return [float(json.loads(one)[key]) for one in found]
