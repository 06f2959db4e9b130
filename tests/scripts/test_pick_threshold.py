"""pick_threshold.sh on a language model of two MoE layers that was trained with a budget."""

import sys
from pathlib import Path

import pick_threshold
import pytest
import torch
from parallel_runs import EXACT, LM, train
from threshold_meter import Meter, Point

from xmoe_fairseq.moe import record_routing


@pytest.fixture(scope="module")
def data(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "bin").symlink_to(corpus[1])
    return folder


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    layers = ("--decoder-layers", 4, "--moe-target-experts-per-token", 2, "--moe-router-init-scale", 3)
    train(1, data / "bin", *LM, *EXACT, *layers, "--lr", 0.02, "--max-update", 8, "--save-dir", folder)
    return folder / "checkpoint_last.pt"


def pick(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pick_threshold", *map(str, arguments)])
    pick_threshold.main()


def as_it_is(checkpoint: Path, data: Path) -> Point:
    meter = Meter(checkpoint, data)
    return meter.measure(tuple(meter.as_it_is))


def test_budget(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = checkpoint.read_bytes()
    pick(monkeypatch, checkpoint, "--data", data, "--budget", 1.5)
    assert checkpoint.read_bytes() == before
    printed = capsys.readouterr().out
    assert "picked" in printed and "as it is" in printed
    output = checkpoint.with_name("checkpoint_last.picked.pt")
    state = torch.load(output, weights_only=True)
    assert state["cfg"]["model"]["moe_target_experts_per_token"] == 0
    assert not any("budget" in name for name in state["model"])
    meter = Meter(output, data)  # opens it as fairseq's commands do
    picked, above = (meter.measure(tuple(t + step for t in meter.as_it_is)) for step in (0, 1 / 512))
    assert picked.thresholds[0] == picked.thresholds[1] == state["cfg"]["model"]["moe_threshold"]
    assert picked.experts <= 1.5 < above.experts
    assert as_it_is(checkpoint, data).experts == pytest.approx(2, abs=0.3)  # not that from the start


def test_budget_of_each_layer(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "new.pt"
    pick(monkeypatch, checkpoint, "--data", data, "--budget", 1.5, "--per-layer", "--output", output)
    meter = Meter(output, data)
    first, second = meter.as_it_is
    assert first != second
    taken = {}
    for sample in meter.batches:
        with torch.no_grad(), record_routing(meter.model) as records:
            meter.model(**sample["net_input"])
        for layer, routing in records:
            tokens, rows = taken.get(layer.name, (0, 0))
            taken[layer.name] = (tokens + routing.num_tokens, rows + routing.rows_wanted)
    assert len(taken) == 2
    for tokens, rows in taken.values():
        assert rows / tokens == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("per_layer", [False, True])
def test_largest_loss(
    per_layer: bool, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    meter = Meter(checkpoint, data)
    picker = pick_threshold.Picker(meter, per_layer)
    start = picker.measure(tuple(meter.as_it_is))
    least = picker.at(picker.dial[0])
    assert least.loss > start.loss  # fewer experts cost something here
    more = (least.loss - start.loss) / 2
    picked = picker.for_loss(more)
    assert start.loss < picked.loss <= start.loss + more
    cheaper = [point for point in picker.tried if point.experts < picked.experts]
    assert cheaper and all(point.loss > start.loss + more for point in cheaper)
    assert picker.for_loss(least.loss - start.loss + 1e-6) == least


def test_errors(
    checkpoint: Path, data: Path, corpus: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    topk = tmp_path / "topk.pt"
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["model"] |= {"moe_router": "topk", "moe_target_experts_per_token": 0}
    state["model"] = {name: value for name, value in state["model"].items() if "budget" not in name}
    torch.save(state, topk)
    here = ("--data", data, "--budget", 2)
    bad = [
        ((tmp_path / "none.pt", *here), "none.pt: No such file"),
        ((tmp_path, *here), f"{tmp_path}: is a folder, no checkpoint"),
        (
            (checkpoint, "--data", tmp_path, "--budget", 2),
            "--data must be a folder of data-prep with bin/valid",
        ),
        ((topk, *here), "CHECKPOINT must be of a model with --moe-router threshold"),
        ((checkpoint, *here, "--output", checkpoint), "which would be overwritten; name another"),
        ((checkpoint, *here, "--output", tmp_path / "no/new.pt"), "--output: there is no folder"),
        (
            (checkpoint, "--data", data, "--budget", 9),
            "--budget must be from 1 to 4, what a token may take, got 9",
        ),
        ((checkpoint, "--data", data, "--budget", 0.5), "--budget must be from 1 to"),
        (
            (checkpoint, "--data", data, "--max-loss", -1),
            "--max-loss must be 0 or more bits per token, got -1",
        ),
    ]
    for arguments, message in bad:
        with pytest.raises(SystemExit) as ended:
            pick(monkeypatch, *arguments)
        assert message in ended.value.code and "\n" not in ended.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["topk.pt"]
