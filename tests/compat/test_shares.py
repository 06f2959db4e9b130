"""W ranks print what one process prints: one score over everything, hypotheses in their order."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from commands import run, run_as_torchrun
from distributed import run_ranks

from xmoe_fairseq_compat.shares import Share, Turns

READ = ("--cpu", "--num-workers", 0, "--required-batch-size-multiple", 1)
GLOO = ("--distributed-backend", "gloo")


def results(output: str) -> list[str]:
    """What was printed, but for configurations and times."""
    printed = re.finditer(
        r"^(?:[STHDP]-.*|Generate .*)$|(?:Translated|Evaluated|Loss|valid on).*", output, re.M
    )
    lines = [found[0] for found in printed]
    return [re.sub(r" in [\d.]+s .*| \| wps .*", "", line) for line in lines]


@pytest.mark.parametrize("ranks", [2, 4])
def test_generate_shared(
    ranks: int, corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """3 batches: uneven shares, and none at all for the fourth rank."""
    command = (
        "fairseq-generate",
        corpus[0],
        "--path",
        stock_models[0],
        *READ,
        "--batch-size",
        4,
        "--beam",
        2,
    )
    one = results(run(*command))
    assert len(one) == 12 * 5 + 2 and "BLEU4" in one[-1] and "12 sentences" in one[-2]
    assert results(run_as_torchrun(ranks, *command, *GLOO)) == one
    if ranks == 2:
        run_as_torchrun(ranks, *command, *GLOO, "--results-path", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["generate-test.txt"]
        assert results((tmp_path / "generate-test.txt").read_text()) == one


@pytest.mark.parametrize("ranks", [2, 4])
def test_eval_lm_shared(ranks: int, corpus: tuple[Path, Path], stock_models: tuple[Path, Path]) -> None:
    command = (
        "fairseq-eval-lm", corpus[1], "--path", stock_models[1], *READ, "--batch-size", 2,
        "--tokens-per-sample", 32, "--context-window", 4,
    )  # fmt: skip
    one = results(run(*command))
    assert len(one) == 2 and "Perplexity" in one[1]
    assert results(run_as_torchrun(ranks, *command, *GLOO)) == one


@pytest.mark.parametrize("ranks", [2, 4])
def test_validate_shared(ranks: int, corpus: tuple[Path, Path], stock_models: tuple[Path, Path]) -> None:
    command = (
        "fairseq-validate", corpus[0], "--task", "translation", "--path", stock_models[0], *READ,
        "--batch-size", 4, "--valid-subset", "valid,test", "--log-format", "simple",
    )  # fmt: skip
    one = results(run(*command))
    assert len(one) == 2
    assert results(run_as_torchrun(ranks, *command, *GLOO)) == one


def test_interactive_on_ranks(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    typed = tmp_path / "typed"
    typed.write_text("w1 w2 w3\nw4\n")
    command = (
        "fairseq-interactive", corpus[0], "--path", stock_models[0], "--cpu", "--input", typed, "--beam", 2,
        "--source-lang", "en", "--target-lang", "de",
    )  # fmt: skip
    one = results(run(*command))
    assert len(one) == 2 * 4
    assert results(run_as_torchrun(2, *command, *GLOO)) == one


def test_each_rank_computes_its_share_and_rank_0_has_all_in_order() -> None:
    def rank() -> tuple[list[int], list[int]]:
        here = SimpleNamespace(distributed_rank=dist.get_rank(), distributed_world_size=dist.get_world_size())
        turns = Turns(SimpleNamespace(common=SimpleNamespace(cpu=True), distributed_training=here))
        computed = []

        def step(batch: int) -> int:
            computed.append(batch)
            return 10 * batch

        found = [turns.compute(step, batch) for batch in Share(turns, range(5))]
        return computed, found

    first, second = run_ranks(2, rank)
    assert first == ([0, 2, 4], [0, 10, 20, 30, 40])
    assert second[0] == [1, 3]
