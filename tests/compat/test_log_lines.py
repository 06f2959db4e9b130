"""What a person reads of a training: few statistics, and one line of the configuration."""

import json
import logging
from argparse import Namespace
from enum import Enum
from pathlib import Path

import pytest
import torch
import yaml
from commands import PLUGIN, TINY_LM, TRAIN, run
from fairseq.logging import progress_bar
from omegaconf import OmegaConf

from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.log_lines import as_yaml


def test_few_statistics_in_a_line_and_all_in_json(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """show_few_statistics"""
    stats = {"loss": 2.5, "my_cost": 3, "my_cost_in_full": 4, "their_cost": 5}
    with caplog.at_level(logging.INFO):
        for unshown in ([], ["my_(?!cost$).*"], ["my_(?!cost$).*", "their_.*"]):
            monkeypatch.setattr(plugins, "unshown", unshown)
            progress_bar.SimpleProgressBar([1], prefix="x").print(stats)
        progress_bar.JsonProgressBar([1]).print(stats)
    *lines, record = (each.getMessage() for each in caplog.records)
    assert lines == [
        "x | loss 2.5 | my_cost 3 | my_cost_in_full 4 | their_cost 5",
        "x | loss 2.5 | my_cost 3 | their_cost 5",
        "x | loss 2.5 | my_cost 3",
    ]
    assert json.loads(record).keys() == stats.keys()


def test_a_configuration_in_yaml() -> None:
    """Namespaces and enums too, whatever they hold; references are not followed."""
    kind, held = Enum("Kind", "some").some, {1: [None, True]}
    odd = Namespace(betas=(0.9, 0.98), kind=kind, text="Straße: 'x'", held=held)
    cfg = OmegaConf.create({"a": {"lr": [0.5], "as": "${a.lr}"}}, flags={"allow_objects": True})
    cfg.model = odd
    model = {"betas": [0.9, 0.98], "kind": "Kind.some", "text": "Straße: 'x'", "held": {"1": [None, True]}}
    assert yaml.safe_load(as_yaml(cfg)) == {"a": {"lr": [0.5], "as": "${a.lr}"}, "model": model}


def trained(corpus: tuple[Path, Path], folder: Path, *flags: object, succeeds: bool = True) -> str:
    few = ("--max-update", 2, "--log-format", "simple", "--save-dir", folder)
    return run("fairseq-train", corpus[1], *TINY_LM, *TRAIN, *few, *flags, succeeds=succeeds)


def test_the_configuration_is_in_the_run_not_in_its_log(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """And is of what the run was trained with, not of what was refused."""
    output, file = trained(corpus, tmp_path), tmp_path / "config.yaml"
    assert f"| fairseq_cli.train | configuration: {file}\n" in output and "'save_dir'" not in output
    config = yaml.safe_load(file.read_text())
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["cfg"]
    assert config["checkpoint"]["save_dir"] == str(tmp_path)
    assert config["model"]["moe_num_experts"] == saved["model"]["moe_num_experts"] == 8
    trained(corpus, tmp_path, "--moe-num-experts", 4, succeeds=False)
    assert yaml.safe_load(file.read_text()) == config


def test_the_configuration_goes_to_the_log_file(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    output = trained(corpus, tmp_path / "run", "--log-file", log)
    assert f"configuration: {log}\n" in output and not (tmp_path / "run/config.yaml").exists()
    assert f"\n  save_dir: {tmp_path / 'run'}\n" in log.read_text() and "| loss " in log.read_text()
    assert "configuration: not shown; --log-file FILE" in trained(corpus, tmp_path / "none", "--no-save")
    assert not (tmp_path / "none/config.yaml").exists()
    evaluated = tmp_path / "eval.log"
    score = ("fairseq-eval-lm", corpus[1], *PLUGIN, "--cpu", "--path", tmp_path / "run/checkpoint_last.pt",
             "--tokens-per-sample", 32)  # fmt: skip
    output = run(*score, "--log-file", evaluated)
    assert f"configuration: {evaluated}\n" in output and "'gen_subset'" not in output
    assert "\n  gen_subset: test\n" in evaluated.read_text()


def test_the_configuration_of_results(
    corpus: tuple[Path, Path], stock_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Without the plugin all is as ever: that is what `brief` is for."""
    read = (corpus[0], "--path", stock_models[0], "--cpu", "--batch-size", 4, "--results-path")
    output = run("fairseq-generate", *read, tmp_path / "stock")
    assert "'results_path'" in output + (tmp_path / "stock/generate-test.txt").read_text()
    assert not (tmp_path / "stock/config.yaml").exists()
    output = run("fairseq-generate", *read, tmp_path / "plugin", *PLUGIN)
    file = tmp_path / "plugin/config.yaml"
    output += (tmp_path / "plugin/generate-test.txt").read_text()  # where the log is, too, on several ranks
    assert "'results_path'" not in output and f"configuration: {file}\n" in output
    assert yaml.safe_load(file.read_text())["common_eval"]["results_path"] == str(tmp_path / "plugin")
