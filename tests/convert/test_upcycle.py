"""xmoe-convert --upcycle: the dense model at the start, whatever its router; then fairseq-train goes on."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DEADLINE, REPO, call, for_shells
from documented import example
from parallel_runs import EXACT, assert_same_training, train
from stock import LM, SMALL, Stock, one_by_one, outputs
from tolerances import about, assert_same

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.convert import convert_command
from xmoe_fairseq.convert.models import TYPED, read_dense, read_sparse
from xmoe_fairseq.moe import moe_layers

LIMITS = SMALL[2:]  # it reads nothing of train


def upcycle(dense: Path, moe: Path, *flags: object, copies: int = 3, parts: int = 4) -> dict[str, Any]:
    """Its report."""
    words = [dense, moe, "--upcycle", copies, "--split", parts, *LIMITS, *flags]
    convert_command.convert(convert_command.argument_parser().parse_args([*map(str, words)]))
    return json.loads(moe.with_suffix(".json").read_text())


def threshold(rule: str, t: float) -> tuple[object, ...]:
    return ("--moe-router", "threshold", "--moe-threshold-rule", rule, "--moe-threshold", t)


def both(side: str) -> list[str]:
    return [f"{side}.layers.0", f"{side}.layers.1"]


@pytest.mark.parametrize(
    "kind, flags, parts, layers",
    [
        ("lm", (), 1, both("decoder")),
        ("lm", ("--moe-freq", 2), 8, ["decoder.layers.1"]),
        ("lm", threshold("mass", 0.75), 4, both("decoder")),
        ("lm", ("--moe-topk", 8), 4, both("decoder")),
        ("mt", ("--moe-topk", 8, "--moe-combine", "normalized"), 4, both("encoder") + both("decoder")),
        ("lm", (*threshold("mass", 1.0), "--moe-combine", "normalized"), 4, both("decoder")),
        ("mt", ("--moe-freq", 2), 4, ["encoder.layers.1", "decoder.layers.1"]),
        ("mt", (*threshold("probability", 0.08), "--no-moe-decoder"), 4, both("encoder")),
        ("mt", (*threshold("relative", 0.001), "--no-moe-encoder"), 16, both("decoder")),
    ],
)  # fmt: skip
def test_it_begins_as_the_dense_model(
    stock: Stock, tmp_path: Path, kind: str, flags: tuple[object, ...], parts: int, layers: list[str]
) -> None:
    path, _ = stock(kind, "--activation-fn", "tanh" if kind == "lm" else "gelu")
    report = upcycle(path, tmp_path / "moe.pt", *flags, parts=parts)
    dense = read_dense(path, None)
    moe = read_sparse(tmp_path / "moe.pt", dense.task)
    assert [layer.name for layer in moe_layers(moe)] == layers
    pad = dense.task.target_dictionary.pad()
    for sample in Batches(dense.task, "valid", 60, 100, 1):
        expected = outputs(dense.model, sample, pad)
        assert_same(outputs(moe, sample, pad), expected)
        assert_same(one_by_one(moe, sample, pad), expected)
    row = report["rows"]["upcycled"]
    wholes = 2 if "--moe-topk" in flags else 1
    assert row["experts_per_token"] == wholes * parts and row["flops"] == about(wholes + 3 * parts / (2 * 64))
    assert row["bits_per_token"] == about(report["reference"]["bits_per_token"])


def test_every_copy_is_taken_by_some_tokens_and_as_a_whole(stock: Stock, tmp_path: Path) -> None:
    path, _ = stock("lm")
    upcycle(path, tmp_path / "moe.pt")
    layers = moe_layers(read_sparse(tmp_path / "moe.pt", read_dense(path, None).task))
    assert not torch.equal(*(layer.router.weight for layer in layers))
    for layer in layers:
        rows = layer(torch.randn(500, 16))[1].rows_per_expert().view(3, 4)
        assert (rows == rows[:, :1]).all() and rows.min() > 20


@pytest.mark.parametrize("going_on", ["--finetune-from-model", "--restore-file"])
def test_fairseq_train_goes_on_on_any_number_of_ranks(stock: Stock, tmp_path: Path, going_on: str) -> None:
    """With the flags that the report has. Its first loss is the dense model's; then the copies part."""
    path, data = stock("lm")
    report = upcycle(path, tmp_path / "moe.pt", copies=2)
    assert "no-moe" not in report["about"][TYPED]
    flags = [
        data, *LM, *EXACT, *shlex.split(report["about"][TYPED]), "--criterion", "moe_cross_entropy",
        "--no-save", "--max-update", 2, going_on, tmp_path / "moe.pt",
    ]  # fmt: skip
    (one,) = train(1, *flags, "--update-freq", 2)
    assert_same_training(train(2, *flags, "--moe-expert-parallel-size", 2), one, 2)
    dense_flags = [data, *LM, *EXACT, "--arch", "transformer_lm", "--no-save", "--max-update", 1]
    (dense,) = train(1, *dense_flags, going_on, path, "--update-freq", 2)
    assert one["logs"][0]["loss"] == about(dense["logs"][0]["loss"])
    experts = one["weights"]["decoder.layers.0.moe.experts.fc1_weight"].unflatten(0, (2, 4))
    assert not torch.allclose(experts[0], experts[1])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--upcycle", 0), "--upcycle and --split must be at least 1, got 0 and 4"),
        (("--upcycle", 2, "--split", 5), "--split must be 1 or more and divide --decoder-ffn-embed-dim 64"),
        (("--upcycle", 2, "--shared", 1), "--shared cannot be combined with --upcycle, got 1"),
        (("--upcycle", 2, "--budget", 0.5), "--budget cannot be combined with --upcycle, got 0.5"),
        (("--upcycle", 2, "--moe-threshold", 0.5), "--moe-threshold needs --moe-router threshold"),
        (("--upcycle", 2, "--moe-threshold-rule", "relative"), "--moe-threshold-rule needs --moe-router"),
        (("--upcycle", 2, "--moe-topk", 6), "--moe-topk needs --moe-router topk, and must be a multiple of"),
        (("--upcycle", 2, "--moe-topk", 12), "--moe-topk (default: --moe-ffn-split) must be at most"),
        (("--upcycle", 2, "--split", 1, "--moe-combine", "normalized"), "needs more than one expert"),
        (("--moe-combine", "normalized"), "--moe-combine needs --upcycle, got normalized"),
        (("--upcycle", 2, "--moe-router", "threshold"), "must be in [0.75, 1] by the rule mass"),
        (("--upcycle", 2, *threshold("mass", 0.7)), "must be in [0.75, 1] by the rule mass"),
        (("--upcycle", 2, *threshold("probability", 0.125)), "must be in [0, 0.125) by the rule prob"),
        (("--upcycle", 2, *threshold("relative", 0)), "must be in [0.001, 1] by the rule relative"),
        (("--upcycle", 2, "--moe-freq", 3), "--moe-freq must be at most --decoder-layers 2"),
        (("--moe-router", "threshold"), "--moe-router needs --upcycle, got threshold"),
        (("--moe-freq", 0), "--moe-freq must be at least 1, got 0"),
        ((), "--calibration must be given (only --upcycle can do without)"),
    ],
)  # fmt: skip
def test_one_line_for_bad_input(
    stock: Stock, tmp_path: Path, flags: tuple[object, ...], message: str
) -> None:
    path, data = stock("lm")
    calibration = ("--calibration", data) if "--moe-freq" in flags and "--upcycle" not in flags else ()
    words = (path, tmp_path / "moe.pt", "--split", 4, *LIMITS, *calibration, *flags)
    status, printed = call(convert_command.main, "xmoe-convert", *words)
    (line,) = [line for line in printed.splitlines() if line.startswith("xmoe-convert: error: ")]
    assert message in line and status == 1 and not [*tmp_path.iterdir()]


def test_data_that_is_no_longer_there(stock: Stock, tmp_path: Path) -> None:
    path, data = stock("lm")
    state = torch.load(path, weights_only=True)
    state["cfg"]["task"]["data"] = "/gone"
    torch.save(state, tmp_path / "dense.pt")
    words = (tmp_path / "dense.pt", tmp_path / "moe.pt", "--upcycle", 2, "--split", 4)
    _, printed = call(convert_command.main, "xmoe-convert", *words)
    assert (
        f"--calibration must be given: {tmp_path}/dense.pt was trained on /gone, which is not there"
        in printed
    )
    upcycle(tmp_path / "dense.pt", tmp_path / "moe.pt", "--calibration", data)


def test_a_model_of_the_plugin_without_experts(stock: Stock, tmp_path: Path) -> None:
    path, _ = stock("lm", "--arch", "xmoe_transformer_lm", "--moe-freq", "0")
    report = upcycle(path, tmp_path / "moe.pt")
    assert report["rows"]["upcycled"]["experts_per_token"] == 4


def test_the_documented_commands(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """As they stand there, but for folders and numbers of updates."""
    block = example("upcycling.md", "## From a dense checkpoint on", "bash")
    block = block.replace("data/lm-sample/bin", str(corpus[1])).replace("runs/", f"{tmp_path}/")
    block = re.sub(r"--max-update \d+", "--max-update 2", block)
    shell = ["bash", "-e"]
    subprocess.run(shell, input=block, text=True, check=True, cwd=REPO, env=for_shells(), timeout=DEADLINE)
    moe = torch.load(tmp_path / "moe" / "checkpoint_last.pt", weights_only=True)
    assert moe["model"]["decoder.layers.1.moe.router.weight"].shape == (16, 128)
