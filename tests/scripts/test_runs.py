"""train.sh, score.sh and compare.sh: from binarised text to one table, on a corpus of a few words."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import logged, refusal, script
from sacrebleu.metrics import BLEU, CHRF
from tolerances import assert_same

from benchmarks import sweep, trained_layers, trained_models
from experiments import average_checkpoints, score, train
from experiments.explain import write_page
from xmoe_fairseq_compat.errors import CheckpointError

SMALLER = ("--max-update", 4, "--save-interval-updates", 2, "--log-interval", 1, "--batch-size")


def test_translation(
    mt_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_forks: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    output = script("wmt/train.sh", "tiny", "xmoe-s2", mt_data, run, *SMALLER, 16, SEED="3")
    assert "8 experts x 128" in output and "= 600 tokens per update" in output
    about = json.loads((run / "run.json").read_text())
    assert (about["model"], about["seed"], about["gpus"]) == ("xmoe-s2", 3, 1)
    assert logged(output, "valid")[-1]["valid_best_bleu"] >= 0  # the checkpoint is chosen by BLEU
    none = tmp_path / "none"
    message = f"score: RUN must be a folder of scripts/wmt/train.sh, with run.json, got {none}"
    assert message in script("wmt/score.sh", none, succeeds=False)
    with_forks(score.main, "wmt", run)
    scores = json.loads((run / "scores.best.json").read_text())
    assert scores["checkpoint"] == "checkpoint_best.pt" and set(scores["splits"]) == {"valid", "test"}
    found = [line.split("\t") for line in (run / "score.best/test.out").read_text().splitlines()]
    texts = {int(line[0][2:]): line[2] for line in found if line[0].startswith("D-")}
    assert not any("▁" in text for text in texts.values())  # detokenised
    reference = (mt_data / "text/test.de").read_text().splitlines()
    expected = {"bleu": BLEU(), "chrf++": CHRF(word_order=2), "chrf": CHRF()}
    for name, metric in expected.items():
        value = metric.corpus_score([texts[i] for i in range(len(reference))], [reference]).score
        assert scores["splits"]["test"][name] == pytest.approx(value)
    assert "nw:2" in scores["signatures"]["chrf++"]
    assert 1 <= scores["splits"]["test"]["routing"]["encoder"]["experts"] <= 4
    assert '"name":"encoder layer 2"' in (run / "explain.best.html").read_text()
    monkeypatch.setattr(sys, "argv", ["timing", str(run), str(run), "--rounds", "2"])
    trained_models.main()
    speed = json.loads((run / "speed.json").read_text())
    assert speed["translation"]["ratio"] > 0 and speed["sentences translated"] == 12
    script("compare.sh", run, OUT=str(tmp_path / "out"))
    assert "translated sentence / the first's | ms/update |" in (tmp_path / "out/compare.md").read_text()
    assert '"name":"encoder layer 2"' in (tmp_path / "out/compare.html").read_text()
    assert "| xmoe-s2 --" in (tmp_path / "out/compare.md").read_text()

    words = [run, "--dense", run, "--thresholds", 1, 0.2, "--rounds", 3, "--out", tmp_path / "sweep"]
    monkeypatch.setattr(sys, "argv", ["sweep", *map(str, words)])
    sweep.main()
    report = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert list(report["rows"]) == [f"{run}, t = 0.2", f"{run}, t = 1"]
    low, high = report["rows"].values()
    assert (low["thresholds"], high["thresholds"]) == ([0.2] * 2, [1.0] * 2)  # one of each side
    assert low["experts_per_token"] < high["experts_per_token"] == 4  # the limit, 2s
    assert low["flops"] < high["flops"]
    head, _, *rows = (tmp_path / "sweep/sweep.md").read_text().splitlines()
    assert head.endswith("| perplexity / that at t = 1 |") and rows[1].endswith("| 1.000 |")
    assert rows[0].endswith(f"| {low['perplexity'] / high['perplexity']:.3f} |")
    assert rows[2].startswith(f"| dense | {report['reference']['perplexity']:.2f} | ")
    assert sweep.thresholds(run, []) == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    state = torch.load(run / "checkpoint_best.pt", weights_only=True)
    state["cfg"]["model"]["moe_threshold_rule"] = "probability"
    torch.save(state, run / "checkpoint_best.pt")
    assert sweep.thresholds(run, []) == [0.24, 0.13, 0.062, 0.026, 0.0081, 0.0016, 1e-4, 0]
    assert sweep.thresholds(run, [0.1, 0.2]) == [0.2, 0.1]


def test_language_model(lm_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    script("lm/train.sh", "tiny", "hash", lm_data, run, *SMALLER, 2)
    few = "score: .* holds 2 checkpoints, too few for --average 5; leave it out to score the best one\n"
    assert re.fullmatch(few, script("lm/score.sh", run, "--average", 5, succeeds=False))
    script("lm/score.sh", run, "--average", 2)
    scores = json.loads((run / "scores.average2.json").read_text())["splits"]["test"]
    text = (lm_data / "text/docs.test").read_text()
    assert (
        scores["tokens"] == scores["words"] == len(text.split()) + text.count("\n")
    )  # a piece is a word here
    assert scores["perplexity_per_word"] == pytest.approx(scores["perplexity"])
    assert scores["routing"] == {"decoder": {"experts": 1.0, "flops": 1.0}}
    monkeypatch.setattr(sys, "argv", ["timing", str(run), str(run), "--rounds", "3"])
    trained_layers.main()
    seconds = json.loads((run / "seconds.json").read_text())
    assert seconds["ratio"] > 0 and seconds["to_dense_ffn"] is False  # but to itself
    trained_models.main()
    speed = json.loads((run / "speed.json").read_text())
    assert speed["update"]["ratio"] > 0 and speed["decoding"]["ratio"] > 0 and speed["to"] == "run"

    paths = sorted(run.glob("checkpoint_*_*.pt"))[-2:]
    first, second, mean = (
        torch.load(path, weights_only=True) for path in (*paths, run / "checkpoint_average2.pt")
    )
    assert "last_optimizer_state" not in mean
    for name, value in mean["model"].items():
        expected = first["model"][name]
        if value.is_floating_point():
            expected = (expected + second["model"][name]) / 2
        assert_same(value, expected)
    table = next(name for name in mean["model"] if name.endswith("table_V"))
    second["model"][table] += 1
    torch.save(second, run / "other.pt")
    with pytest.raises(CheckpointError, match=f"{table} differs from that in"):
        average_checkpoints.average([paths[0], run / "other.pt"])
    del second["model"][table]
    torch.save(second, run / "other.pt")
    with pytest.raises(CheckpointError, match=f"other.pt: it has no {table}, which .* has"):
        average_checkpoints.average([paths[0], run / "other.pt"])


def test_scores_are_kept_where_there_is_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_page(tmp_path / "none.pt", "data", "test", tmp_path / "page.html")
    assert f"NO PAGE of the experts that tokens take: {tmp_path}/none.pt: no such" in capsys.readouterr().err


def test_bad_arguments_of_train(lm_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    bad = [
        (("lm", "tiny", "best", lm_data, run), "MODEL must be one of dense"),
        (("lm", "tiny", "dense", tmp_path, run), "DATA must be a folder of data-prep with bin/ in it"),
        (("wmt", "tiny", "dense", lm_data, run), "DATA must hold binarised pairs, bin/train.SRC-TGT.SRC.idx"),
    ]
    for arguments, message in bad:
        assert message in refusal(train.main, monkeypatch, *arguments)
    assert not run.exists()
    assert script("lm/train.sh", succeeds=False).endswith("are required: preset, model, data, run\n")
    monkeypatch.setenv("SEED", "one")
    assert "SEED must be a whole number, got one" in refusal(
        train.main, monkeypatch, "lm", "tiny", "dense", lm_data, run
    )
    monkeypatch.setenv("SEED", "1")
    run.mkdir()
    there = {"task": "lm", "preset": "tiny", "model": "switch", "data": str(lm_data), "seed": 1, "flags": []}
    (run / "run.json").write_text(json.dumps(there))
    message = refusal(train.main, monkeypatch, "lm", "tiny", "dense", lm_data, run)
    assert "holds a run with model switch, not dense; name a new one" in message
    (run / "run.json").write_text(json.dumps(there | {"model": "dense", "moved_to_gpus": True}))
    message = refusal(train.main, monkeypatch, "lm", "tiny", "dense", lm_data, run)
    assert "holds a run with moved_to_gpus True, not False; name a new one" in message
    (run / "run.json").write_text('{"task": "lm"}')
    message = refusal(train.main, monkeypatch, "lm", "tiny", "dense", lm_data, run)
    assert "run.json: must have task, preset, model" in message


def test_further_shards_are_training_data(lm_data: Path, tmp_path: Path) -> None:
    for name in ("bin", "bin1", "bin2", "bin10", "binary"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/dict.txt").touch()
    assert [Path(p).name for p in train.shards(tmp_path, "lm").split(":")] == ["bin", "bin1", "bin2", "bin10"]
