"""Two GPUs, or two processes on a CPU: experts spread over them against one process."""

import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from gpu_check.commands import RANKS, ROOT, logged, place, run, write_corpus
from gpu_check.outcomes import Case, Check, Failed, Found, Skip
from gpu_check.training import LIMIT, TRAIN, folder, median_difference, scores

MOST = 1e-3  # the median over the updates of a norm's difference: sums are taken in another order
HERE = Path(__file__).resolve().parent
SPREAD = ("--moe-expert-parallel-size", RANKS, "--update-freq", 1)
# Each backend once, and each kind of checkpoint.
LAYOUTS: dict[str, tuple[object, ...]] = {
    "legacy_ddp, whole checkpoint": ("--ddp-backend", "legacy_ddp"),
    "pytorch_ddp, sharded checkpoint": ("--ddp-backend", "pytorch_ddp", "--moe-sharded-checkpoints"),
}


def checks(case: Case) -> Iterator[Check]:
    def where_there_are_two(check: Callable[..., Found], *arguments: str) -> Found:
        if case.device.type == "cuda" and (found := torch.cuda.device_count()) < RANKS:
            raise Skip(f"needs {RANKS} GPUs, found {found}")
        return check(case, *arguments)

    yield Check("ranks layer, one rank without tokens", partial(where_there_are_two, layers))
    yield Check("ranks one process", partial(where_there_are_two, one_process))
    for name in LAYOUTS:
        yield Check(f"ranks {name}", partial(where_there_are_two, as_one_process, name))
    yield Check("ranks one is killed", partial(where_there_are_two, killed))


def layers(case: Case) -> Found:
    """See rank_layer.py."""
    script = (ROOT / "scripts" / "run.py", "gpu_check.rank_layer", "--device", case.device.type)
    output = run(case, "ranks layer", *script, ranks=RANKS)
    return Found("; ".join(re.findall(r"rank 0: (.*)", output)))


def train(case: Case, name: str, data: Path, *flags: object, ranks: int) -> list[float]:
    """The norm at each update. An update is of the same sentences in any number of ranks."""
    flags = ("--max-update", case.updates, "--save-dir", folder(case, name), *flags, *place(case, ranks))
    return logged(run(case, f"ranks {name}", "fairseq-train", data, *TRAIN, *flags, ranks=ranks), "gnorm")


def one_process(case: Case) -> Found:
    """What the layouts are compared with."""
    norms = train(case, "one process", write_corpus(case), "--update-freq", RANKS, ranks=1)
    case.alone = norms, mean_score(case, "one process")
    return Found(f"{len(norms)} updates", {"gnorm": norms})


def as_one_process(case: Case, name: str) -> Found:
    if not hasattr(case, "alone"):
        one_process(case)
    expected, score = case.alone
    norms = train(case, name, case.work / "bin", *SPREAD, *LAYOUTS[name], ranks=RANKS)
    off, numbers = median_difference(norms, expected), {"gnorm": norms, "one process": expected}
    if not off <= MOST:
        raise Failed(f"norms differ from one process's by {off:.1e}, limit {MOST:.0e}", numbers)
    is_sharded = (folder(case, name) / "experts").is_dir()
    if is_sharded != ("sharded" in name):
        raise Failed(f"experts/ must {'' if 'sharded' in name else 'not '}be beside the checkpoint")
    if not abs(mean_score(case, name) / score - 1) <= LIMIT:
        raise Failed(f"one process must translate from its checkpoint with mean score {score:.3f}", numbers)
    return Found(f"norms within {off:.0e}; one process translates from its checkpoint", numbers)


def mean_score(case: Case, name: str) -> float:
    return statistics.mean(scores(case, folder(case, name), f"generate from {name}").values())


def killed(case: Case) -> Found:
    """The others end too, soon, and it is said which rank did."""
    flags = ("--max-update", case.updates, "--no-save", *SPREAD, *place(case, RANKS))
    script = HERE / "train_and_die.py"
    words = (script, write_corpus(case), *TRAIN, *flags)
    output = run(case, "ranks killed", *words, ranks=RANKS, succeeds=False)
    if not (said := re.search(r"rank +: 1\b|no answer from ranks \[1\]", output)):
        raise Failed(f"the log must name rank 1 (log: {case.work}/ranks-killed.log)")
    return Found(f"the other ended too; {said[0]}")
