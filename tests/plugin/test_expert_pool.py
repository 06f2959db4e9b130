"""--moe-adapt-experts-every, from the command line to a checkpoint and back."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import TRAIN
from fairseq.optim.fp16_optimizer import FP16Optimizer
from parallel_runs import EXACT, LM, MT, UNUSED, assert_same_training, train
from torch import Tensor, nn

from xmoe_fairseq.load import FILE
from xmoe_fairseq.moe import TopAnyRouter
from xmoe_fairseq.trainer import tell_optimizer

POOL = ("--moe-router", "topany", "--moe-initial-experts", 1, "--moe-adapt-experts-every")


def saved(checkpoint: Path, name: str = "") -> dict[str, Tensor]:
    model = torch.load(checkpoint, weights_only=True)["model"]
    return {key: value for key, value in model.items() if name in key and not UNUSED.search(key)}


def test_a_run_is_resumed_bit_for_bit_across_a_check(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """From update 3, by the records of three updates before it and of one after."""
    flags = (corpus[1], *LM, *TRAIN, *POOL, 4, "--save-interval-updates", 1, "--validate-interval-updates", 1)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    (run,) = train(1, *flags, "--max-update", 5, "--save-dir", straight)
    (middle,) = straight.glob("checkpoint_*_3.pt")
    train(1, *flags, "--max-update", 5, "--save-dir", resumed, "--restore-file", middle)
    expected, got = saved(straight / "checkpoint_last.pt"), saved(resumed / "checkpoint_last.pt")
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert saved(middle, ".pool.tokens_E")["decoder.layers.1.moe.router.pool.tokens_E"].any()
    experts = [log["moe_decoder_active_experts 0"] / log["moe_decoder_tokens 0"] for log in run["logs"]]
    assert experts == [1, 1, 1, 1, 2]
    records = [json.loads(line) for line in (straight / FILE).read_text().splitlines()]
    used = [record["layers"]["decoder.layers.1"] for record in records if record["set"] == "valid"]
    assert [layer["active_experts"] for layer in used] == [1, 1, 1, 2, 2]
    assert all(not any(layer["rows"][layer["active_experts"] :]) for layer in used)


def test_ranks_add_and_remove_as_one_process(corpus: tuple[Path, Path]) -> None:
    """By all ranks' tokens, and not by those of a dummy batch, wherever the experts lie."""
    flags = (corpus[0], *MT, *EXACT, *POOL, 1, "--no-save", "--batch-size", 7, "--max-epoch", 1)
    runs = train(4, *flags, "--update-freq", 3, "--moe-expert-parallel-size", 2)
    reference = train(1, *flags, "--update-freq", 12)[0]
    assert_same_training(runs, reference, 2)
    experts = [log["moe_decoder_active_experts 0"] / log["moe_decoder_tokens 0"] for log in reference["logs"]]
    assert experts == [1, 2]


def test_an_expert_that_comes_stays_in_half_precision(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """The optimizer has copies of the weights in fp32, which do not take it back."""
    flags = (corpus[1], *LM, *TRAIN, *POOL, 2, "--bf16", "--lr", "1e-9", "--save-interval-updates", 1)
    train(1, *flags, "--max-update", 3, "--save-dir", tmp_path)
    before, comes, after = (
        saved(next(tmp_path.glob(f"checkpoint_*_{n}.pt")), ".router.weight").popitem()[1] for n in (1, 2, 3)
    )
    assert torch.equal(before[0], comes[0]) and not torch.allclose(before[1], comes[1], atol=0.01)
    assert torch.equal(comes, after)


@pytest.mark.parametrize("flat", [False, True])
def test_an_optimizer_in_half_precision_is_told_of_what_has_changed(flat: bool) -> None:
    """What has not changed keeps the digits that the parameter itself cannot hold."""
    model = nn.ModuleList([nn.Linear(3, 3), TopAnyRouter(3, 4)]).bfloat16()
    params = list(model.parameters())
    copies: Any = FP16Optimizer.build_fp32_params(None, params, flatten=False)
    with torch.no_grad():
        for p, copy in zip(params, copies, strict=True):
            copy.add_(torch.rand_like(copy) * 1e-3)
            p.copy_(copy)
    optimizer = SimpleNamespace(fp16_params=params, fp32_params=copies)
    if flat:
        optimizer.fp32_params = {0: nn.Parameter(torch.cat([copy.detach().flatten() for copy in copies]))}
    expected = [copy.detach().clone() for copy in copies]
    router = model[1]
    with torch.no_grad():
        router.weight[2] = expected[2][2] = torch.tensor([0.5, -0.25, 2.0])
        router.threshold_E[2] = expected[3][2] = 0.0
    tell_optimizer(optimizer, model)
    held = optimizer.fp32_params
    held = torch.cat([copy.flatten() for copy in held]) if not flat else held[0]
    assert torch.equal(held, torch.cat([value.flatten() for value in expected]))
    tell_optimizer(SimpleNamespace(), model)  # one without copies
