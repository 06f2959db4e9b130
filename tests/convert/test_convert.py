"""xmoe-convert from end to end: the same outputs at t = 1, what it writes, and what it says of bad input."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from commands import PLUGIN, TRAIN, run
from distributed import run_ranks
from parallel_runs import fairseq_train
from stock import LM, SMALL, Stock, one_by_one, outputs
from tolerances import about, assert_same

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.convert import convert_command
from xmoe_fairseq.convert.models import read_dense, read_sparse
from xmoe_fairseq.moe import moe_layers
from xmoe_fairseq.moe.records import fix_thresholds
from xmoe_fairseq.thresholds import threshold_command
from xmoe_fairseq.thresholds.checkpoint import open_meter
from xmoe_fairseq_compat.errors import CheckpointError, FlagError


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_command, "PRECISION", 1 / 16)
    monkeypatch.setattr(convert_command, "BUDGETS", (1.0,))


def convert(dense: Path, sparse: Path, data: Path, *flags: str, split: int = 8) -> None:
    words = [str(dense), str(sparse), "--split", str(split), "--calibration", str(data), *SMALL, *flags]
    convert_command.convert(convert_command.argument_parser().parse_args(words))


@pytest.mark.parametrize(
    "kind, flags, grouping",
    [
        ("lm", ("--activation-fn", "gelu"), "coactivation"),
        ("mt", (), "clustering"),
        ("lm", (), "coactivation --shared 2 --budget 0.5 --router-hidden-dim 4"),
        ("mt", ("--activation-fn", "gelu_accurate", "--decoder-normalize-before"), "random"),
    ],
)
def test_with_all_experts_it_is_the_dense_model(
    stock: Stock, tmp_path: Path, kind: str, flags: tuple[str, ...], grouping: str
) -> None:
    path, data = stock(kind, *flags)
    sparse_path = tmp_path / "sparse.pt"
    convert(path, sparse_path, data, "--grouping", *grouping.split())
    dense = read_dense(path, str(data))
    sparse = read_sparse(sparse_path, dense.task)
    layers = moe_layers(sparse)
    assert len(layers) == (2 if kind == "lm" else 4)
    pad, samples = dense.task.target_dictionary.pad(), list(Batches(dense.task, "valid", 60, 100, 1))
    assert any(
        not torch.allclose(outputs(sparse, s, pad), outputs(dense.model, s, pad), atol=1e-2) for s in samples
    )
    fix_thresholds(sparse, [1.0] * len(layers))
    for sample in samples:
        expected = outputs(dense.model, sample, pad)
        assert_same(outputs(sparse, sample, pad), expected)
        assert_same(one_by_one(sparse, sample, pad), expected)


def test_one_side_alone_with_a_t_for_each_layer(stock: Stock, tmp_path: Path) -> None:
    path, data = stock("mt")
    convert(path, tmp_path / "sparse.pt", data, "--no-moe-encoder", "--per-layer", "--max-loss", "0.005")
    sparse = read_sparse(tmp_path / "sparse.pt", read_dense(path, str(data)).task)
    report = json.loads((tmp_path / "sparse.json").read_text())
    layers = moe_layers(sparse)
    assert [layer.name.split(".")[0] for layer in layers] == ["decoder", "decoder"]
    assert [layer.router.threshold for layer in layers] == report["rows"]["chosen"]["thresholds"]
    bits = report["reference"]["bits_per_token"]
    assert report["reference"]["name"] == "dense"
    assert report["rows"]["chosen"]["bits_per_token"] <= bits + 0.005 / math.log(2)  # the flag's are nats
    assert report["rows"]["budget 1"]["bits_per_token"] == about(bits)


@pytest.mark.parametrize("rule, everything", [("mass", 1.0), ("probability", 0.0), ("relative", 1.0)])
def test_any_rule(stock: Stock, tmp_path: Path, rule: str, everything: float) -> None:
    path, data = stock("lm")
    flags = ("--moe-threshold-rule", rule, "--budget", "0.5", "--finetune-updates", "4")
    convert(path, tmp_path / "sparse.pt", data, *flags)
    report = json.loads((tmp_path / "sparse.json").read_text())
    meter = open_meter(tmp_path / "sparse.pt", data)
    assert meter.rule.name == rule == report["about"]["threshold rule"]
    chosen, whole = report["rows"]["chosen"], report["rows"]["budget 1"]
    assert meter.in_use == chosen["thresholds"]
    assert chosen["flops"] <= 0.5 and chosen["experts_per_token"] > 1
    assert whole["thresholds"] == [everything] * 2 and whole["experts_per_token"] == 8


def test_xmoe_threshold_goes_on_from_the_result(
    stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = stock("mt")
    convert(path, tmp_path / "sparse.pt", data, "--shared", "1", "--budget", "0.5")
    words = ["xmoe-threshold", tmp_path / "sparse.pt", "--data", data, "--per-layer", "--budget"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "1.5"])
    with pytest.raises(FlagError, match="--budget must be from 2 to 8, what a token may take, got 1.5"):
        threshold_command.main()  # the shared expert and one more
    monkeypatch.setattr(sys, "argv", [*map(str, words), "3"])
    threshold_command.main()
    report = json.loads((tmp_path / "sparse.picked.json").read_text())
    t = report["rows"]["chosen"]["thresholds"]
    assert 2.5 < report["rows"]["chosen"]["experts_per_token"] <= 3
    assert len(set(t)) > 1 and open_meter(tmp_path / "sparse.picked.pt", data).in_use == t


@pytest.fixture(scope="module")
def plain(stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The parameters of a language model that was converted without fine-tuning."""
    path, data = stock("lm")
    sparse = tmp_path_factory.mktemp("plain") / "sparse.pt"
    convert(path, sparse, data)
    return torch.load(sparse, weights_only=True)["model"]


@pytest.mark.parametrize("tuned, loss", [("router", "distill"), ("all", "task")])
def test_fine_tuning_moves_the_moe_layers_alone(
    stock: Stock, plain: dict[str, torch.Tensor], tmp_path: Path, tuned: str, loss: str
) -> None:
    path, data = stock("lm")
    flags = ("--finetune-updates", "4", "--finetune", tuned, "--finetune-loss", loss)
    convert(path, tmp_path / "tuned.pt", data, *flags)
    moved = torch.load(tmp_path / "tuned.pt", weights_only=True)["model"]
    names = [name for name in plain if "_float_tensor" not in name]  # fairseq leaves it uninitialised
    changed = {name for name in names if not torch.equal(plain[name], moved[name])}
    parts = ("router.weight",) if tuned == "router" else ("router.weight", "fc1_weight", "output_bias")
    assert all(any(name.endswith(part) for name in changed) for part in parts)
    kept = {name for name in changed if ".moe." not in name or (tuned == "router" and "router" not in name)}
    assert not kept, {name: (plain[name] - moved[name]).abs().max() for name in kept}


def test_stock_commands_open_the_result(stock: Stock, tmp_path: Path) -> None:
    path, data = stock("lm")
    sparse = tmp_path / "new" / "sparse.pt"
    said = run("xmoe-convert", path, sparse, "--split", 8, "--calibration", data, *SMALL)
    assert "| chosen |" in said and "100%" in said  # table and progress
    assert sorted(file.name for file in sparse.parent.iterdir()) == [
        "sparse.json", "sparse.md", "sparse.png", "sparse.pt"
    ]  # fmt: skip
    evaluate = ("fairseq-eval-lm", data, *PLUGIN, "--cpu", "--gen-subset", "valid", "--path", sparse)
    assert "Perplexity" in run(*evaluate, "--tokens-per-sample", 16, "--batch-size", 4)


def test_fairseq_train_goes_on_with_the_settings_of_the_result(stock: Stock, tmp_path: Path) -> None:
    """Or says which it would lose, as flags that make it go on."""
    path, data = stock("lm")
    convert(path, tmp_path / "sparse.pt", data)
    t = torch.load(tmp_path / "sparse.pt", weights_only=True)["cfg"]["model"]["moe_threshold"]
    save_dir = tmp_path / "tuned"
    flags = [
        data, *LM, *TRAIN, "--max-update", 1, "--save-dir", save_dir,
        "--finetune-from-model", tmp_path / "sparse.pt", "--arch", "xmoe_transformer_lm",
    ]  # fmt: skip

    def train() -> str:
        sys.argv = ["fairseq-train", *map(str, flags)]
        try:
            fairseq_train(*flags)
        except CheckpointError as error:
            return str(error)
        return ""

    (line,) = run_ranks(1, train)
    added = line.partition("; add ")[2].partition(" to keep them")[0]
    assert f"--moe-threshold {t}" in added and "--moe-combine ones" in added
    flags += added.split()
    assert run_ranks(1, train) == [""]
    kept = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)["cfg"]["model"]
    assert kept["moe_threshold"] == t and kept["moe_combine"] == "ones"
