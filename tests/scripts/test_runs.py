"""train.sh, score.sh and compare.sh: from binarised text to one table, on a corpus of a few words."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import logged, script
from sacrebleu.metrics import BLEU, CHRF
from tolerances import assert_same

from benchmarks import sweep, trained_layers
from experiments import average_checkpoints, compare, score, train
from experiments.plot_runs import Run, styles_of
from xmoe_fairseq_compat.errors import CheckpointError, UserError

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
    script("compare.sh", run, OUT=str(tmp_path / "out"))
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


def test_language_model(lm_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    script("lm/train.sh", "tiny", "hash", lm_data, run, *SMALLER, 2)
    script("lm/score.sh", run, "--average", 2)
    scores = json.loads((run / "scores.average2.json").read_text())["splits"]["test"]
    text = (lm_data / "text/docs.test").read_text()
    assert (
        scores["tokens"] == scores["words"] == len(text.split()) + text.count("\n")
    )  # a piece is a word here
    assert scores["perplexity_per_word"] == pytest.approx(scores["perplexity"])
    assert scores["routing"] == {"decoder": {"experts": 1.0, "flops": 1.0}}
    monkeypatch.setattr(sys, "argv", ["trained_layers", str(run), str(run), "--rounds", "3"])
    trained_layers.main()
    assert json.loads((run / "seconds.json").read_text())["ratio"] > 0

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


def call(main: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The one line with which a tool ends."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    with pytest.raises(UserError) as ended:
        main()
    assert "\n" not in str(ended.value)
    return str(ended.value)


def test_bad_arguments_of_train(lm_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    bad = [
        (("lm", "tiny", "best", lm_data, run), "MODEL must be one of dense"),
        (("lm", "tiny", "dense", tmp_path, run), "DATA must be a folder of data-prep with bin/ in it"),
        (("wmt", "tiny", "dense", lm_data, run), "DATA must hold binarised pairs, bin/train.SRC-TGT.SRC.idx"),
    ]
    for arguments, message in bad:
        assert message in call(train.main, monkeypatch, *arguments)
    assert not run.exists()
    assert script("lm/train.sh", succeeds=False).endswith("are required: preset, model, data, run\n")
    monkeypatch.setenv("SEED", "one")
    assert "SEED must be a whole number, got one" in call(
        train.main, monkeypatch, "lm", "tiny", "dense", lm_data, run
    )
    monkeypatch.setenv("SEED", "1")
    run.mkdir()
    there = {"task": "lm", "preset": "tiny", "model": "switch", "data": str(lm_data), "seed": 1, "flags": []}
    (run / "run.json").write_text(json.dumps(there))
    message = call(train.main, monkeypatch, "lm", "tiny", "dense", lm_data, run)
    assert "holds a run with model switch, not dense; name a new one" in message
    (run / "run.json").write_text('{"task": "lm"}')
    message = call(train.main, monkeypatch, "lm", "tiny", "dense", lm_data, run)
    assert "run.json: must have task, preset, model" in message


def test_further_shards_are_training_data(lm_data: Path, tmp_path: Path) -> None:
    for name in ("bin", "bin1", "bin2", "bin10", "binary"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/dict.txt").touch()
    assert [Path(p).name for p in train.shards(tmp_path, "lm").split(":")] == ["bin", "bin1", "bin2", "bin10"]


def made_up_run(
    folder: Path, model: str, seed: int, perplexity: float, data: str = "data", preset: str = "tiny"
) -> Path:
    folder.mkdir(parents=True)
    about = {"task": "lm", "preset": preset, "model": model, "data": data, "seed": seed, "flags": []}
    (folder / "run.json").write_text(json.dumps(about))
    sides = {} if model.startswith("dense") else {"decoder": {"experts": 2.5, "flops": 0.75}}
    result = {"perplexity": perplexity, "perplexity_per_word": 2 * perplexity, "routing": sides}
    (folder / "scores.best.json").write_text(json.dumps({"splits": {"valid": result, "test": result}}))
    log = [
        "| num. shared model params: 1,500,000 (num. trained: 1)",
        "| num. expert model params: 500,000 (x)",
    ]
    log += [f'| train_inner | {{"num_updates": "{n}", "ups": "4", "ppl": "9"}}' for n in (50, 100)]
    log += [f'| valid | {{"valid_num_updates": "{n}", "valid_ppl": "{900 / n}"}}' for n in (50, 100)]
    (folder / "train.log").write_text("\n".join(log) + "\n")
    return folder


def test_compare_takes_seeds_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        made_up_run(tmp_path / "a", "xmoe-s2", 1, 20.0),
        made_up_run(tmp_path / "b", "xmoe-s2", 2, 22.0),
        made_up_run(tmp_path / "c", "dense", 1, 30.0),
    ]
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs), "--out", str(tmp_path / "out")])
    compare.main()
    table = (tmp_path / "out/compare.md").read_text().splitlines()
    cells = {row.split(" | ")[0][2:]: row.strip("| ").split(" | ") for row in table}
    titles = cells["model"]
    dense, xmoe = (dict(zip(titles, cells[name], strict=True)) for name in ("dense", "xmoe-s2"))
    assert list(cells)[2:] == ["dense", "xmoe-s2"]
    assert (xmoe["runs"], xmoe["test ppl"]) == ("2", "21.00 ± 1.41")
    assert (dense["experts/token"], dense["MoE FLOPs / dense FFN"]) == ("-", "1.00")
    assert (xmoe["experts/token"], xmoe["MoE FLOPs / dense FFN"]) == ("2.50", "0.75")
    assert (xmoe["s/update"], xmoe["training seconds"], xmoe["parameters (M)"]) == ("0.250", "25", "2.0")
    everything = json.loads((tmp_path / "out/compare.json").read_text())
    assert everything[0]["curve"] == [[50, 18], [100, 9]]
    assert compare.FFN_SECONDS not in titles
    (runs[0] / "seconds.json").write_text('{"ratio": 0.5}')
    compare.main()
    (row,) = (line for line in (tmp_path / "out/compare.md").read_text().splitlines() if "dense" in line[:8])
    assert compare.FFN_SECONDS in (tmp_path / "out/compare.md").read_text() and " | - | " in row
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    said = call(compare.main, monkeypatch, *runs, "--out", tmp_path / "out", "--quality", "BLEU")
    assert said.startswith("--quality must be one of valid ppl, valid ppl/word, test ppl")


def test_rows_with_further_flags_look_different() -> None:
    flags = [[], ["--moe-threshold", "0.8"], ["--moe-threshold", "0.7"]]
    rows = {str(given): [Run(Path(), {"model": "xmoe-s4", "flags": given}, {}, [])] for given in flags}
    rows["dense"] = [Run(Path(), {"model": "dense", "flags": []}, {}, [])]
    plain, *with_flags, dense = styles_of(rows).values()
    assert dense["color"] != plain["color"] and "markerfacecolor" not in plain
    assert all(style["color"] == plain["color"] for style in with_flags)
    assert len({style["marker"] for style in (plain, *with_flags)}) == 3


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (made_up_run(tmp_path / name, "dense", 1, 30.0, data=name) for name in ("here", "there"))
    out = ("--out", tmp_path / "out")
    assert "runs must be of the same data" in call(compare.main, monkeypatch, here, there, *out)
    missing = call(compare.main, monkeypatch, here, *out, "--scores", "average3")
    assert "scores.average3.json: No such file" in missing and "train and score each run first" in missing
    part = made_up_run(tmp_path / "part", "dense", 1, 30.0)
    scores = json.loads((part / "scores.best.json").read_text())
    del scores["splits"]["test"]
    (part / "scores.best.json").write_text(json.dumps(scores))
    message = call(compare.main, monkeypatch, part, *out)
    assert "scores.best.json: holds no test; score the run again without --splits" in message
    assert not (tmp_path / "out").exists()
    scores = json.loads((here / "scores.best.json").read_text())
    del scores["splits"]["valid"]  # as grid.py scores: the columns are those that all runs have
    (here / "scores.best.json").write_text(json.dumps(scores))
    more = made_up_run(tmp_path / "more", "switch", 1, 30.0, data="here")
    monkeypatch.setattr(sys, "argv", ["compare", str(more), str(here), *map(str, out)])
    compare.main()
    head = (tmp_path / "out/compare.md").read_text().splitlines()[0]
    assert "test ppl" in head and "valid ppl" not in head
    assert math.isnan(compare.load(here, "best").values["experts/token"])


def test_runs_shorter_than_the_log_interval_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fairseq then logs what an epoch took, or not even that."""
    run = made_up_run(tmp_path / "run", "dense", 1, 30.0)
    log = "| num. shared model params: 1,500,000\n"
    (run / "train.log").write_text(log + '| train | {"train_num_updates": "8", "train_ups": "2"}\n')
    values = compare.load(run, "best").values
    assert (values["updates"], values["s/update"]) == (8, 0.5)
    (run / "train.log").write_text(log)
    monkeypatch.setattr(sys, "argv", ["compare", str(run), "--out", str(tmp_path / "out")])
    compare.main()
    assert "| dense | 1 | 30.00 |" in (tmp_path / "out/compare.md").read_text()


def test_wide_dense_models_compute_more(tmp_path: Path) -> None:
    wide = made_up_run(tmp_path / "wide", "dense-wide", 1, 30.0, preset="claims")
    assert compare.load(wide, "best").values["MoE FLOPs / dense FFN"] == 1984 / 512
