"""fairseq-train for some updates in each precision, against fp32; recomputed, resumed, and generated from."""

import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check.commands import LOADING, PLUGIN, TESTED, logged, place, run, write_corpus
from gpu_check.outcomes import Case, Check, Failed, Found, is_wanted

# An epsilon larger than the gradients: the update is as large as they are, so that a wrong scale shows.
TRAIN: tuple[object, ...] = (
    *PLUGIN, "--task", "translation", "--arch", "xmoe_transformer_tiny", "--encoder-embed-dim", 64,
    "--encoder-ffn-embed-dim", 128, "--moe-num-experts", 8, "--moe-ffn-split", 2, "--batch-size", 8,
    "--required-batch-size-multiple", 1, "--criterion", "moe_cross_entropy", "--dropout", 0,
    "--optimizer", "adam", "--lr", 0.05, "--adam-eps", 0.1, "--clip-norm", 1, "--log-format", "json",
    "--log-interval", 1, "--seed", 7, "--no-epoch-checkpoints", "--disable-validation", *LOADING,
)  # fmt: skip
RUNS: dict[str, tuple[object, ...]] = {
    "fp32": (), "bf16": ("--bf16",), "fp16": ("--fp16",), "amp": ("--amp",),
    "memory-efficient fp16": ("--memory-efficient-fp16",), "recomputation": ("--checkpoint-activations",),
}  # fmt: skip
COMPUTED_IN = {"bf16": "bfloat16", "fp16": "float16", "memory-efficient fp16": "float16", "amp": "float16"}
LIMIT = 0.01  # of the norm and of the loss: the median over the updates
GENERATE = ("-s", "en", "-t", "de", "--beam", 2, "--max-len-b", 10, "--batch-size", 8, *LOADING)
TOLD: dict[str, tuple[object, ...]] = {"fp32": (), "bf16": ("--bf16",), "fp16": ("--fp16",)}


def checks(case: Case) -> Iterator[Check]:
    """All runs are started at once, as many as there are processors for; each check waits for its own."""
    with ThreadPoolExecutor(max(1, min(5, (os.cpu_count() or 1) // 2))) as pool:
        data = pool.submit(write_corpus, case)
        data.exception()  # before a run takes the place that it needs
        names = wanted(case, "train", RUNS) or ["fp32"]
        runs = {name: pool.submit(train, case, data, name) for name in names}
        made = {
            name: pool.submit(generate, case, runs["fp32"], name) for name in wanted(case, "generate", TOLD)
        }
        try:
            for name in RUNS:
                yield Check(f"train {name}", partial(against_fp32, case, runs, name))
            yield Check("train save and resume", partial(resume, case, runs["fp32"]))
            for name in TOLD:
                yield Check(f"generate {name}", partial(as_fp32, made, name))
        finally:  # an interruption starts no more
            pool.shutdown(cancel_futures=True)


def wanted(case: Case, group: str, names: Iterable[str]) -> list[str]:
    """And fp32 first, with which they are compared."""
    found = [name for name in names if is_wanted(case, f"{group} {name}")]
    return list(dict.fromkeys(["fp32", *found])) if found else []


def train(case: Case, data: "Future[Path]", name: str) -> str:
    saving: tuple[object, ...] = ("--no-save",)
    if name == "fp32":
        saving = ("--save-dir", folder(case, name), "--save-interval-updates", case.updates // 2)
    flags = ("--max-update", case.updates, *saving, *RUNS[name], *place(case))
    return run(case, f"train {name}", "fairseq-train", data.result(), *TRAIN, *flags)


def folder(case: Case, name: str) -> Path:
    return Path(case.work / f"checkpoints-{name}")


def against_fp32(case: Case, runs: "dict[str, Future[str]]", name: str) -> Found:
    output = runs[name].result()
    numbers: dict[str, Any] = {}
    for key in ("gnorm", "loss"):
        found, expected = logged(output, key), logged(runs["fp32"].result(), key)
        if len(found) != case.updates:
            raise Failed(f"{len(found)} of {case.updates} updates were logged: did the loss scale overflow?")
        numbers |= {key: found, f"{key}, difference": median_difference(found, expected)}
    kernels = check_kernels(case, name, output)
    norm, loss = numbers["gnorm, difference"], numbers["loss, difference"]
    if not max(norm, loss) <= LIMIT:
        raise Failed(
            f"norm differs from fp32's by {norm:.2%}, loss by {loss:.2%}, limit {LIMIT:.0%}", numbers
        )
    first, *_, last = numbers["loss"]
    if not last < 0.95 * first:
        raise Failed(f"loss must fall by 5 %, went from {first} to {last}", numbers)
    return Found(f"by {kernels}; norm within {norm:.2%}, loss within {loss:.2%} of fp32", numbers)


def check_kernels(case: Case, name: str, output: str) -> str:
    """By which the log says that experts are computed, in the run's precision; on a GPU the grouped one."""
    found = sorted(set(re.findall(r"experts are computed by kernel (\S+) \(\w+, torch\.(\w+)\)", output)))
    is_cpu, dtype = case.device.type == "cpu", COMPUTED_IN.get(name, "float32")
    if name == "amp" and is_cpu:  # where it has no loss scaler either
        dtype = "bfloat16"
    if {each for _, each in found} != {dtype} or not (is_cpu or found == [("grouped", dtype)]):
        raise Failed(f"experts must compute in {dtype}{'' if is_cpu else ' by grouped'}, log says {found}")
    return " and ".join(kernel for kernel, _ in found)


def median_difference(found: list[float], expected: list[float]) -> float:
    return statistics.median(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def resume(case: Case, straight: "Future[str]") -> Found:
    """From the checkpoint in the middle: the norms that the run without a break had."""
    expected, half = logged(straight.result(), "gnorm"), case.updates // 2
    (middle,) = folder(case, "fp32").glob(f"checkpoint_*_{half}.pt")
    flags = ("--restore-file", middle, "--max-update", case.updates, "--save-dir", folder(case, "resumed"))
    output = run(case, "train resumed", "fairseq-train", case.work / "bin", *TRAIN, *flags, *place(case))
    found = logged(output, "gnorm")
    if len(found) != case.updates - half:
        raise Failed(f"must go on for {case.updates - half} updates, went on for {len(found)}")
    if not (off := max(abs(a / b - 1) for a, b in zip(found, expected[half:], strict=True))) <= 1e-3:
        raise Failed(f"a norm differs from that of a run without a break by {off:.1e}, limit 1e-3")
    return Found(f"from update {half} norms within {off:.0e} of a run without a break", {"gnorm": found})


def generate(case: Case, trained: "Future[str]", precision: str) -> dict[int, float]:
    trained.result()
    return scores(case, folder(case, "fp32"), f"generate {precision}", *TOLD[precision])


def scores(case: Case, checkpoints: Path, name: str, *flags: object) -> dict[int, float]:
    """Of the best translation, by the number of the sentence."""
    path = ("--path", checkpoints / "checkpoint_last.pt", *flags, *place(case))
    output = run(case, name, "fairseq-generate", case.work / "bin", *PLUGIN, *GENERATE, *path)
    found = {int(number): float(score) for number, score in re.findall(r"^H-(\d+)\t(\S+)", output, re.M)}
    if len(found) != TESTED or not all(map(math.isfinite, found.values())):
        raise Failed(
            f"must translate {TESTED} sentences with finite scores, got {len(found)}", {"scores": found}
        )
    return found


def as_fp32(made: "dict[str, Future[dict[int, float]]]", name: str) -> Found:
    """A translation may be another one where two are as good; the scores are as high."""
    found, exact = (statistics.mean(made[each].result().values()) for each in (name, "fp32"))
    if not (off := abs(found / exact - 1)) <= 2 * LIMIT:
        raise Failed(f"mean score {found:.3f} must be within {2 * LIMIT:.0%} of fp32's {exact:.3f}")
    return Found(f"{TESTED} translations, mean score within {off:.2%} of fp32", {"mean score": found})
