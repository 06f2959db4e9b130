"""xmoe-threshold on models of two MoE layers that were trained with a budget."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PLUGIN, call, run
from fairseq import checkpoint_utils
from parallel_runs import EXACT, LM, MT, train
from tolerances import assert_same

from xmoe_fairseq.parallel.checkpoint_command import convert as shard
from xmoe_fairseq.thresholds import threshold_command
from xmoe_fairseq.thresholds.checkpoint import open_meter
from xmoe_fairseq.thresholds.measure import Meter, Quality

BUDGET = ("--moe-target-experts-per-token", 2, "--moe-threshold-rule", "mass")
BUDGET = (*EXACT, *BUDGET, "--moe-router-init-scale", 3, "--lr", 0.02)


@pytest.fixture(scope="module")
def data(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "bin").symlink_to(corpus[1])
    return folder


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    flags = (*LM, *BUDGET, "--decoder-layers", 4, "--max-update", 8, "--save-dir", folder)
    train(1, data / "bin", *flags)
    return folder / "checkpoint_last.pt"


@pytest.fixture
def pick(monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["xmoe-threshold", *map(str, arguments)])
        threshold_command.main()

    return call


def meter_of(checkpoint: Path, data: Path) -> tuple[Meter, list[float]]:
    """And the thresholds that the checkpoint has, as fairseq's commands open it."""
    meter = open_meter(checkpoint, data)
    return meter, meter.in_use


def as_it_is(checkpoint: Path, data: Path) -> Quality:
    meter, thresholds = meter_of(checkpoint, data)
    return meter.measure(thresholds)


def test_budget(checkpoint: Path, data: Path, pick: Any, capsys: pytest.CaptureFixture) -> None:
    before = checkpoint.read_bytes()
    pick(checkpoint, "--data", data, "--budget", 1.5)
    assert checkpoint.read_bytes() == before
    printed = capsys.readouterr().out
    output = checkpoint.with_name("checkpoint_last.picked.pt")
    assert "| as it is |" in printed and "| chosen |" in printed and f"written: {output}, " in printed
    assert re.search(
        r"\nchosen: 0\.\d\d of the dense FFN's FLOPs \(as it is: \d\.\d\d\), .*perplexity", printed
    )
    state = torch.load(output, weights_only=True)
    assert state["cfg"]["model"]["moe_target_experts_per_token"] == 0
    assert not any("budget" in name for name in state["model"]) and not state["last_optimizer_state"]
    assert "metrics" not in state["extra_state"]  # measured of other thresholds
    meter, (t, other) = meter_of(output, data)
    assert t == other == state["cfg"]["model"]["moe_threshold"]
    chosen, above = meter.measure([t, t]), meter.measure([t + 1 / 512] * 2)
    assert chosen.experts_per_token <= 1.5 < above.experts_per_token
    was = as_it_is(checkpoint, data)
    assert was.experts_per_token == pytest.approx(2, abs=0.3)  # not that from the start
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["reference"]["name"] == "as it is"
    for entry, quality in ((report["reference"], was), (report["rows"]["chosen"], chosen)):
        for name in ("thresholds", "bits_per_token", "experts_per_token", "flops", "perplexity"):
            assert_same(entry[name], getattr(quality, name))
        assert entry["ffn_seconds"] > 0
    assert len(report["curve"]) == len(report["rows"]) > 5


def test_part_of_the_validation_set(checkpoint: Path, data: Path, pick: Any, tmp_path: Path) -> None:
    sizes = ("--max-tokens", 32, "--valid-tokens", 40)
    pick(checkpoint, "--data", data, "--budget", 1.5, *sizes, "--output", tmp_path / "new.pt")
    report = json.loads((tmp_path / "new.json").read_text())
    assert report["about"]["validation tokens"] == 40
    meter = open_meter(checkpoint, data, max_tokens=32, valid_tokens=40)
    assert 40 <= sum(sample["ntokens"] for sample in meter.batches) < 40 + 32
    part, whole = meter.measure(meter.in_use), as_it_is(checkpoint, data)
    assert_same(report["reference"]["bits_per_token"], part.bits_per_token)
    assert part.bits_per_token != whole.bits_per_token


def test_a_budget_with_a_t_for_each_layer(checkpoint: Path, data: Path, pick: Any, tmp_path: Path) -> None:
    """On average over the layers."""
    output = tmp_path / "new.pt"
    pick(checkpoint, "--data", data / "bin", "--budget", 1.5, "--per-layer", "--output", output)
    report = json.loads(output.with_suffix(".json").read_text())
    meter, thresholds = meter_of(output, data)
    assert thresholds == report["rows"]["chosen"]["thresholds"]
    chosen = meter.measure(thresholds)
    assert 1.4 < chosen.experts_per_token <= 1.5


@pytest.mark.parametrize("flags", [(), ("--per-layer",)])
@pytest.mark.parametrize("rule", ["probability", "relative"])
def test_a_budget_by_another_rule(
    rule: str, flags: tuple[str, ...], checkpoint: Path, data: Path, pick: Any, tmp_path: Path
) -> None:
    output, again = tmp_path / "new.pt", tmp_path / "again.pt"
    pick(
        checkpoint, "--data", data, "--budget", 1.5, "--moe-threshold-rule", rule, *flags, "--output", output
    )
    report = json.loads(output.with_suffix(".json").read_text())
    about = report["about"]
    assert (about["threshold rule"], about["threshold rule as it is"]) == (rule, "mass")
    meter, thresholds = meter_of(output, data)
    assert meter.rule.name == rule and thresholds == report["rows"]["chosen"]["thresholds"]
    chosen, was = meter.measure(thresholds), as_it_is(checkpoint, data)
    assert 1.4 < chosen.experts_per_token <= 1.5
    assert_same(report["rows"]["chosen"]["bits_per_token"], chosen.bits_per_token)
    assert_same(report["reference"]["bits_per_token"], was.bits_per_token)  # by its own rule
    pick(output, "--data", data, "--budget", 1.5, *flags, "--output", again)  # whose rule is now this
    for one, other in zip(meter_of(again, data)[1], thresholds, strict=True):
        assert one == other


@pytest.mark.parametrize("flags", [(), ("--per-layer",)])
def test_largest_loss(
    flags: tuple[str, ...], checkpoint: Path, data: Path, pick: Any, tmp_path: Path
) -> None:
    meter, thresholds = meter_of(checkpoint, data)
    start, least = meter.measure(thresholds), meter.measure([0.0, 0.0])
    assert least.bits_per_token > start.bits_per_token  # fewer experts cost something here
    most = least.bits_per_token - start.bits_per_token
    more = 0.8 * most  # less is out of reach by layers: they were not trained with these thresholds
    common = (checkpoint, "--data", data, *flags, "--output", tmp_path / "new.pt", "--max-loss")
    pick(*common, more)
    report = json.loads((tmp_path / "new.json").read_text())
    chosen, allowed = report["rows"]["chosen"], start.bits_per_token + more
    assert start.bits_per_token < chosen["bits_per_token"] <= allowed
    cheaper = [point for point in report["curve"] if point["experts_per_token"] < chosen["experts_per_token"]]
    assert cheaper and all(point["bits_per_token"] > allowed for point in cheaper)
    pick(*common, most + 1e-6)
    report = json.loads((tmp_path / "new.json").read_text())
    assert report["rows"]["chosen"]["experts_per_token"] == pytest.approx(1, abs=1e-3)


def test_it_measures_what_training_logs(checkpoint: Path, data: Path) -> None:
    meter, thresholds = meter_of(checkpoint, data)
    quality = meter.measure(thresholds)
    cfg = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))["cfg"]
    criterion, sums = meter.batches.task.build_criterion(cfg.criterion), {}
    for sample in meter.batches:
        with torch.no_grad():
            for name, value in criterion(meter.model, sample)[2].items():
                sums[name] = sums.get(name, 0) + torch.as_tensor(value).double().sum().item()
    of = {name: sums[f"moe_decoder_{name}"] for name in ("tokens", "rows_kept_E", "flops", "flops_dense_ffn")}
    nats = sums["loss"] / sums["ntokens"]
    assert_same(quality.bits_per_token * math.log(2), nats, dtype=torch.float32)
    assert quality.flops == of["flops"] / of["flops_dense_ffn"]
    assert quality.experts_per_token == of["rows_kept_E"] / of["tokens"]


def test_a_batch_holds_a_block_at_least(checkpoint: Path, data: Path) -> None:
    first = next(iter(open_meter(checkpoint, data, max_tokens=1).batches))
    assert first["target"].shape == (1, 32)


def test_translation_chosen_by_bleu_with_experts_in_shards(
    corpus: tuple[Path, Path], pick: Any, tmp_path: Path
) -> None:
    train(1, corpus[0], *MT, *BUDGET, "--max-update", 3, "--save-dir", tmp_path / "run")
    last, whole = tmp_path / "run/checkpoint_last.pt", tmp_path / "run/whole.pt"
    state = torch.load(last, weights_only=True)
    state["cfg"]["task"] |= {"eval_bleu": True, "eval_bleu_detok": "moses"}  # which is not installed
    torch.save(state, whole)
    shard(whole, tmp_path / "shards/sharded.pt", 2)
    picked = []
    for path in (whole, tmp_path / "shards/sharded.pt"):
        pick(path, "--data", corpus[0], "--budget", 1.5, "--max-tokens", 100)
        output = path.with_suffix(".picked.pt")
        assert as_it_is(output, corpus[0]).experts_per_token <= 1.5
        picked.append(torch.load(output, weights_only=True))
    assert picked[1]["cfg"]["task"]["eval_bleu"] and "expert_shards" not in picked[1]
    assert picked[0]["cfg"]["model"] == picked[1]["cfg"]["model"]
    assert picked[0]["model"].keys() == picked[1]["model"].keys()


def test_errors(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    topk, here = tmp_path / "topk.pt", ("--data", data, "--budget", 2)
    report = tmp_path / "old.md"
    report.symlink_to(checkpoint)
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["model"] |= {"moe_router": "topk", "moe_target_experts_per_token": 0}
    state["model"] = {name: value for name, value in state["model"].items() if "budget" not in name}
    torch.save(state, topk)
    (tmp_path / "empty").mkdir()
    for file in data.glob("bin/dict*"):
        (tmp_path / "empty" / file.name).symlink_to(file)
    bad = [
        ((tmp_path / "none.pt", *here), "none.pt: no such file"),
        ((tmp_path, *here), f"{tmp_path}: is a folder, no checkpoint"),
        (("", *here), ".: is a folder, no checkpoint"),
        ((checkpoint, *here, "--output", tmp_path), f"--output {tmp_path} is a folder; name a file in it"),
        ((report, *here, "--output", tmp_path / "old.pt"), f"its report would overwrite {report}; name"),
        ((checkpoint, "--data", tmp_path, "--budget", 2), "--data must be a folder of data-prep or fairseq-"),
        ((checkpoint, "--data", tmp_path / "empty", "--budget", 2), "no set 'valid' in "),
        ((topk, *here), "CHECKPOINT must be of a model with --moe-router threshold"),
        ((checkpoint, *here, "--output", checkpoint), "which would be overwritten; name another"),
        ((checkpoint, *here, "--output", tmp_path / "new.json"), "--output must not end in .json, as its"),
        ((checkpoint, *here, "--output", tmp_path / "no/new.pt"), "--output: there is no folder"),
        ((checkpoint, "--data", data, "--budget", 9), "--budget must be from 1 to 4, what a token may take, "
         "got 9"),
        ((checkpoint, "--data", data, "--budget", 0.5), "--budget must be from 1 to"),
        ((checkpoint, "--data", data, "--max-loss", -1), "--max-loss must be 0 or more bits per token, got"),
        ((checkpoint, *here, "--max-tokens", 0), "--max-tokens must be at least 1, got 0"),
        ((checkpoint, *here, "--valid-tokens", 0), "--valid-tokens must be at least 1, got 0"),
    ]  # fmt: skip
    for arguments, message in bad:
        status, said = call(threshold_command.main, "xmoe-threshold", *arguments)
        assert status == 1 and message in said and said.count("\n") == 1
        assert said.startswith("xmoe-threshold: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old.md", "topk.pt"]


def test_an_interruption_leaves_no_file(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Meter, "timed", interrupted)
    flags = ("--data", data, "--budget", 2, "--output", tmp_path / "new.pt")
    status, said = call(threshold_command.main, "xmoe-threshold", checkpoint, *flags)
    assert status and said.endswith("\nxmoe-threshold: interrupted\n") and "Traceback" not in said
    assert not list(tmp_path.iterdir())


OWN = """
from xmoe_fairseq.moe import ThresholdRouter, register_router


@register_router("own_threshold")
class OwnRouter(ThresholdRouter):
    description = "as XMoE's"
"""


def test_a_router_of_one_s_own(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "own_thresholds").mkdir()
    (tmp_path / "own_thresholds" / "__init__.py").write_text(OWN)
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["model"]["moe_router"] = "own_threshold"
    torch.save(state, tmp_path / "own.pt")
    words = ("xmoe-threshold", tmp_path / "own.pt", "--data", data, "--budget", 1.5)
    missing = run(*words, succeeds=False).splitlines()[-1]
    assert missing.startswith("xmoe-threshold: error: cannot load checkpoint ")
    assert ": its router own_threshold is not registered; add the --user-dir that registers it" in missing
    assert run(*words, *PLUGIN, succeeds=False).splitlines()[-1] == missing
    run(*words, "--user-dir", tmp_path / "own_thresholds")
    picked = torch.load(tmp_path / "own.picked.pt", weights_only=True)["cfg"]["model"]
    assert picked["moe_router"] == "own_threshold" and not picked["moe_target_experts_per_token"]
