"""What benchmark_training.sh and benchmark_decoding.sh compare; at sizes at which no time means anything."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import decoding, parts, training, updates
from benchmarks.language_model import Shape, inputs_of_shape, random_models
from benchmarks.subjects import EVERY_SLOT, SlotExperts
from xmoe_fairseq.moe import record_routing

COMMON = ["--threads", "1", "--rounds", "2"]
MT = (
    "--max-tokens 180 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 "
    "--encoder-attention-heads 2 --decoder-attention-heads 2"
)
LM = (
    "--batch-size 3 --tokens-per-sample 12 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 "
    "--decoder-attention-heads 2"
)


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in updates.SIZES.items():
        monkeypatch.setitem(updates.SIZES, name, replace(size, vocabulary=60, repeats=1))
    monkeypatch.setattr(updates, "BATCHES", 2)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "benchmark.json").read_text())["rows"]


@pytest.mark.parametrize(
    "size, flags, tokens",
    [("demo-mt", MT, (120, 180)), ("code", MT, (120, 180)), ("claims-lm", LM, (36, 36))],
)
def test_updates_of_all_models_and_their_parts(
    size: str, flags: str, tokens: tuple[int, int], tmp_path: Path
) -> None:
    training.main([*COMMON, "--size", size, "--warm-up", "3", "--flags", flags, "--out", str(tmp_path)])
    (row,) = rows_of(tmp_path)
    peer = ["Hugging Face, grouped"] if find_spec("transformers") else []
    ours = ["dense", "native", "plain", "dense, equal active width"]
    assert [*row["timings"]] == [*ours, *peer, "fairscale, top-2", *EVERY_SLOT]
    assert tokens[0] <= row["tokens"] <= tokens[1]
    assert 1 <= float(row["experts per token"]) <= 3  # a budget of 2
    table = (tmp_path / "benchmark.md").read_text()
    for name, found in row["parts"].items():
        passes = {part for part, (forward, backward) in found.items() if forward and backward}
        sparse = {parts.MOE, parts.ROUTER, parts.EXPERTS} if name == "native" else set()
        everywhere = {parts.EMBEDDING, parts.ATTENTION, parts.FFN, parts.OUTPUT, parts.CRITERION, parts.MODEL}
        assert passes - {parts.EMBEDDING} == everywhere - {parts.EMBEDDING} | sparse
        assert {*parts.STEPS} <= {*found}
        assert f"{sum(map(sum, found.values())):.2f} (" in table


def test_a_size_has_the_budget_of_half_the_dense_ffn() -> None:
    for name, size in updates.SIZES.items():
        cfg = updates.Setup(size, []).model_cfg
        assert cfg.moe_target_experts_per_token * 2 == cfg.moe_ffn_split, name


class Wrong(SlotExperts):
    def expert(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return super().expert(x, w1, b1, w2 * 1.1, b2)


def test_training_refuses_to_compare_unequal_models(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = updates.Setup(updates.SIZES["demo-lm"], LM.split())
    model = setup.model()
    training.check_equal(setup, model)
    monkeypatch.setitem(EVERY_SLOT, "paper's way", Wrong)
    with pytest.raises(AssertionError, match="paper's way differs"):
        training.check_equal(setup, model)


def test_a_dense_model_of_equal_active_width_is_as_wide_as_the_experts_taken() -> None:
    setup = updates.Setup(updates.SIZES["demo-lm"], LM.split())
    dense = updates.with_narrow_ffns(setup, setup.model())
    assert [layer.fc1.out_features for layer in dense.decoder.layers] == [32, 16]  # 2 of 4 parts


def test_marks_charge_the_backward_pass_to_the_part_that_made_it() -> None:
    """A product by a function that says which part is being timed when its gradient is taken."""
    clock, seen = parts.Clock(), []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(clock.part)
            return grad * 2

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return Spy.apply(self.inner(Spy.apply(x)))

    class Inner(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Spy.apply(x)

    hooks, outer = parts.Hooks(clock), Outer()
    hooks.add("outer", outer)
    hooks.add("inner", outer.inner)
    x = torch.ones(1, requires_grad=True)
    outer(x).backward()
    assert x.grad == 8
    assert seen == [("outer", True), ("inner", True), ("outer", True)]
    assert {*clock.seconds} >= {("outer", False), ("inner", False)}


def test_decoding_by_each_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FFN_TOKENS", (1, 8))
    monkeypatch.setattr(decoding, "BATCHES", (1, 2))
    monkeypatch.setattr(decoding, "STEPS", 3)
    shape = ["--shape", "2", "16", "64", "8"]
    monkeypatch.setattr(sys, "argv", ["decoding", *COMMON, *shape, "--out", str(tmp_path)])
    decoding.main()
    rows = rows_of(tmp_path)
    whats = ["decoding", "scoring"] * 2 + ["FFN alone"] * 2
    assert [row["what"] for row in rows] == whats
    for row in rows:
        timings = row["timings"]
        whole = row["what"] != "FFN alone"
        assert [*timings] == ["dense", "native", "plain", *(["no experts"] if whole else [])]
        assert row["times as fast"] == f"{1 / timings['native']['ratio']:.2f}"
        assert row["at most"] == (f"{1 / timings['no experts']['ratio']:.2f}" if whole else "")


def test_without_experts_nothing_is_routed() -> None:
    _, sparse = random_models(Shape(2, 16, 64, 8))
    inputs, routings = inputs_of_shape(2), []
    for model in (sparse, decoding.without_experts(sparse), sparse):
        with record_routing(model) as records:
            decoding.decode(model, inputs, 3)()
        routings.append(len(records))
    assert routings == [6, 0, 6]
