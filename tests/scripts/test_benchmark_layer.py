"""What benchmark_layer.sh compares; at sizes at which no time means anything."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import layer, subjects
from benchmarks.memory import peak_memory
from benchmarks.subjects import EVERY_SLOT, SlotExperts
from xmoe_fairseq.moe import use_kernel

TINY = layer.Size(12, 8, 4, 16, 2)
FLAGS = ["--threads", "1", "--rounds", "2"]


@pytest.fixture
def tiny_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "SIZES", (TINY, TINY._replace(per_token=1.4)))
    monkeypatch.setattr(layer, "GRAINS", (TINY, TINY._replace(experts=8, width=8, per_token=4)))
    monkeypatch.setattr(layer, "DECODED", (TINY._replace(tokens=1), TINY))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "benchmark.json").read_text())["rows"]


@pytest.mark.usefixtures("tiny_layers")
def test_layers_are_compared_with_all_that_is_installed(tmp_path: Path) -> None:
    layer.main([*FLAGS, "--only", "layer", "granularity", "decoding", "--out", str(tmp_path)])
    rows = rows_of(tmp_path)
    assert [row["section"] for row in rows] == ["layer"] * 4 + ["granularity"] + ["decoding"] * 2
    assert [row["pass"] for row in rows[:4]] == ["forward", "forward + backward"] * 2
    ours, slots = ["native", "plain"], list(EVERY_SLOT)
    peer = ["Hugging Face, grouped"] if find_spec("transformers") else []
    first = ["floor", *ours, "dense, equal active width", *peer]
    assert [*rows[0]["timings"]] == [*first, "fairscale, top-2", *slots]
    assert [*rows[2]["timings"]] == [*first, *slots]
    assert [*rows[4]["timings"]] == ["E 4", "E 8"]
    assert [*rows[5]["timings"]] == ["dense, all experts' width", *ours, *peer]
    table = (tmp_path / "benchmark.md").read_text()
    native = rows[0]["timings"]["native"]
    assert f"| {native['ratio']:.2f} ({native['low']:.2f} to {native['high']:.2f}) |" in table
    assert "| 1 | T 12, D 8, 4 x 16, 1.4 per token | forward + backward |" in table


@pytest.mark.usefixtures("tiny_layers")
def test_what_is_not_there_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "missing", lambda: "it is gone")
    monkeypatch.setitem(sys.modules, "transformers", None)
    layer.main([*FLAGS, "--only", "decoding", "--out", str(tmp_path)])
    assert {*rows_of(tmp_path)[0]["timings"]} == {"dense, all experts' width", "plain"}
    table = (tmp_path / "benchmark.md").read_text()
    assert "\nWithout the native kernel: it is gone; run: " in table
    assert "\nWithout Hugging Face's block: pip install transformers\n" in table


def test_plain_has_plain_routers_and_native_native_ones() -> None:
    """Or the native kernel would be compared with half of itself."""
    found = {}
    for name in ("native", "plain"):
        block, x, kernel = layer.everything(TINY)[name]
        with use_kernel(kernel), torch.profiler.profile() as profile:
            block(x)
        found[kernel] = "xmoe::route" in {event.key for event in profile.key_averages()}
    assert found == {"native": True, "plain": False}


class Wrong(SlotExperts):
    def expert(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return super().expert(x, w1, b1, w2, b2 + 0.01)


def test_slots_that_compute_otherwise_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVERY_SLOT, "paper's way", Wrong)
    with pytest.raises(AssertionError, match="paper's way differs"):
        layer.everything(TINY)


def test_peak_memory_is_what_a_call_holds_at_once() -> None:
    assert 60 < peak_memory(lambda: lambda: torch.ones(2**24).sum()) < 75  # 67 MB
