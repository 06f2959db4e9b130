"""What xmoe-convert refuses, or cannot finish: one line, and no file left."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from stock import SMALL, Stock

from xmoe_fairseq.convert import convert_command


@pytest.mark.parametrize(
    "flags, words, message",
    [
        ((), {"split": 5}, "--split must be 2 or more and divide --decoder-ffn-embed-dim 64, got 5"),
        ((), {"split": 1}, "--split must be 2 or more and divide"),
        (("--activation-fn", "tanh"), {}, "--activation-fn must be one of relu, relu_squared, gelu"),
        (("--scale-fc",), {}, "--scale-fc cannot be combined with MoE layers"),
        ((), {"more": ("--budget", "0.01")}, "--budget must be at least 0."),
        ((), {"more": ("--budget", "1.5")}, "--budget must be in (0, 1], got 1.5"),
        ((), {"more": ("--shared", "7")}, "--shared must be from 0 to --split 8 less 2, got 7"),
        ((), {"more": ("--max-loss", "-1")}, "--max-loss must be above 0, got -1.0"),
        ((), {"more": ("--no-moe-decoder",)}, "leave nothing to convert"),
        ((), {"data": "elsewhere"}, "--calibration must be a folder of data-prep or fairseq-preprocess"),
        ((), {"dense": "nothing.pt"}, "nothing.pt: no such file"),
        ((), {"dense": "."}, ": is a folder, no checkpoint"),
        ((), {"sparse": "there.pt"}, "there.pt exists already"),
        ((), {"sparse": "new.md"}, "SPARSE must not end in .md, as its report does, got "),
    ],
)
def test_one_line_for_bad_input(
    stock: Stock, tmp_path: Path, flags: tuple[str, ...], words: dict[str, Any], message: str,
) -> None:  # fmt: skip
    path, data = stock("lm", *flags)
    (tmp_path / "there.pt").touch()
    sparse = tmp_path / words.get("sparse", "sparse.pt")
    printed = said(
        words.get("dense", path), sparse, "--split", words.get("split", 8),
        "--calibration", tmp_path / words["data"] if "data" in words else data, *SMALL,
        *words.get("more", ()),
    )  # fmt: skip
    (line,) = [line for line in printed.splitlines() if line.startswith("xmoe-convert: error: ")]
    assert message in line
    assert [file.name for file in tmp_path.iterdir()] == ["there.pt"]


def said(*words: Any) -> str:
    """Output of a call that must fail."""
    status, text = call(convert_command.main, "xmoe-convert", *words)
    assert status == 1
    return text


def test_other_models_are_refused(stock: Stock, tmp_path: Path) -> None:
    path, data = stock(
        "lm", "--arch", "xmoe_transformer_lm", "--moe-num-experts", "4", "--moe-ffn-split", "4"
    )
    common = (tmp_path / "sparse.pt", "--split", 4, "--calibration", data)
    assert "is sparse already" in said(path, *common)
    state = torch.load(path, weights_only=True)
    state["cfg"]["model"]["_name"] = "lstm"
    torch.save(state, tmp_path / "lstm.pt")
    printed = said(tmp_path / "lstm.pt", *common)
    assert "must hold a transformer or transformer_lm, got lstm" in printed
    path, data = stock("lm")
    state = torch.load(path, weights_only=True)
    for number, words in (("nan", "number.pt: it holds NaN in"), ("inf", "number.pt holds NaN or inf in")):
        state["model"]["decoder.layers.1.fc1.weight"][3, 4] = float(number)
        torch.save(state, tmp_path / "number.pt")
        printed = said(tmp_path / "number.pt", *common)
        assert f"{words} decoder.layers.1.fc1.weight" in printed
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    assert "other.pt" in said(tmp_path / "other.pt", *common)


def test_an_interruption_leaves_no_file(
    stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    path, data = stock("lm")
    monkeypatch.setattr(torch, "save", interrupted)
    printed = said(path, tmp_path / "sparse.pt", "--split", 8, "--calibration", data, *SMALL)
    assert printed.endswith("xmoe-convert: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_file(stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    path, data = stock("lm")
    monkeypatch.setattr(torch, "save", full)
    printed = said(path, tmp_path / "sparse.pt", "--split", 8, "--calibration", data, *SMALL)
    assert printed.splitlines()[-1].endswith(f"cannot write {tmp_path}/sparse.pt: no space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("grouping", ["coactivation", "clustering", "random"])
@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight"])
def test_weights_beyond_all_measure(grouping: str, name: str, stock: Stock, tmp_path: Path) -> None:
    path, data = stock("lm")
    state = torch.load(path, weights_only=True)
    state["model"][f"decoder.layers.0.{name}"].fill_(1e38)
    torch.save(state, tmp_path / "huge.pt")
    flags = ("--split", 8, "--calibration", data, *SMALL, "--grouping", grouping)
    printed = said(tmp_path / "huge.pt", tmp_path / "sparse.pt", *flags)
    assert "huge.pt: what decoder.layers.0 computes is beyond fp32, with weights of up to 1e+38" in printed


def test_weights_that_do_not_fit_take_one_line(stock: Stock, tmp_path: Path) -> None:
    path, data = stock("lm")
    state = torch.load(path, weights_only=True)
    state["model"]["decoder.layers.0.fc1.bias"] = torch.zeros(3)
    state["model"]["decoder.layers.1.fc1.bias"] = "text"
    torch.save(state, tmp_path / "other.pt")
    printed = said(tmp_path / "other.pt", tmp_path / "sparse.pt", "--split", 8, "--calibration", data)
    (line,) = [line for line in printed.splitlines() if "xmoe-convert: " in line]
    assert "other.pt: its weights do not fit the model: decoder.layers.0.fc1.bias is [3], not [64]" in line
    assert "decoder.layers.1.fc1.bias is no tensor" in line
