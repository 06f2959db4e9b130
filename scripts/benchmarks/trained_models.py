"""Times whole updates, greedy decoding and beam search of models of runs, all in turn; writes RUN/speed.json.

    python scripts/run.py benchmarks.trained_models RUN ... [--rounds 15]

The first RUN is what the others are compared with. Batches are of validation text, as large as in training;
beam search is that of score.sh, of translation models. One thread.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq.trainer import Trainer

from benchmarks.decoding import STEPS, decode, inputs_of_data
from benchmarks.timing import add_rounds, forward, in_turn, machine
from benchmarks.updates import BATCHES, updates
from experiments.catalogue import TranslationPreset
from experiments.plan import LENGTHS, Plan
from experiments.results import read_run, write_json
from experiments.runs import Run, alike
from xmoe_fairseq.batches import Batches
from xmoe_fairseq.thresholds.checkpoint import open_model

SENTENCES = 8  # decoded at a time
SEARCHED = 2  # batches
Work = dict[str, Callable[[], Any]]


def as_trained(model: Any, task: Any, cfg: Any) -> Callable[[], None]:
    """What updates the model further, its statistics and budgets included."""
    tokens = cfg.dataset.max_tokens or cfg.dataset.batch_size * cfg.task.tokens_per_sample
    samples = list(Batches(task, "valid", BATCHES * tokens, tokens, seed=1))
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    return updates(trainer, samples[:BATCHES])


def search(model: Any, task: Any, plan: Plan) -> tuple[Callable[[], None], int]:
    """What translates a few batches as score.py does, and how many sentences they are."""
    assert isinstance(plan.size, TranslationPreset)
    samples = list(Batches(task, "valid", SEARCHED * plan.batch_tokens, plan.batch_tokens, seed=1))[:SEARCHED]
    generator = task.build_generator([model], argparse.Namespace(beam=plan.size.beam, **LENGTHS))

    def run() -> None:
        for sample in samples:
            task.inference_step(generator, [model], sample)

    return forward(run), sum(len(sample["id"]) for sample in samples)


def searches(opened: dict[str, Any], about: dict[str, Any]) -> tuple[Work, int]:
    """Of each model; and the sentences, the same for all."""
    work: Work = {}
    for run, (model, task, _) in opened.items():
        work[run], sentences = search(model, task, Plan.of_run(about[run]))
    return work, sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    add_rounds(parser, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = {str(run.folder): run.about for run in alike([Run(run, read_run(run), {}) for run in args.runs])}
    opened = {
        run: open_model(Path(run, "checkpoint_best.pt"), Path(each["data"])) for run, each in about.items()
    }
    decoding: Work = {
        run: decode(model, inputs_of_data(task, SENTENCES), STEPS) for run, (model, task, _) in opened.items()
    }
    found = {"decoding": in_turn(decoding, args.rounds)}
    counts = {"tokens decoded": SENTENCES * STEPS}
    if about[str(args.runs[0])]["task"] == "wmt":
        searching, counts["sentences translated"] = searches(opened, about)
        found["translation"] = in_turn(searching, args.rounds)
    training: Work = {run: as_trained(*each) for run, each in opened.items()}
    found["update"] = in_turn(training, args.rounds, calls=BATCHES)
    for run in opened:
        timings = {what: timing[run] for what, timing in found.items()}
        print(f"{Path(run).name}: " + "; ".join(f"{what} {timing}" for what, timing in timings.items()))
        more = {"to": args.runs[0].name, "machine": machine()}
        write_json(Path(run) / "speed.json", {**timings, **counts, **more})


if __name__ == "__main__":
    main()
