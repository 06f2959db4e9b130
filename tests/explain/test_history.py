"""What a run's folder says."""

import json
from pathlib import Path

import pytest

from xmoe_fairseq.explain.beside import beside
from xmoe_fairseq.explain.collect import Layer
from xmoe_fairseq.explain.history import experts_of_layers, numbers, read_run, read_runs, threshold_reports
from xmoe_fairseq_compat.errors import UserError

LAYER = Layer("decoder layer 2", "decoder", ["0", "1"], 2, [], 1, [3, 0], 3, 6, 1.0, 2.0, {})
AT = "2026-11-26 05:54:15 | INFO | "


def test_a_line_in_each_of_fairseqs_formats() -> None:
    line = AT + 'train_inner | {"epoch": 1, "ppl": "5051.4", "num_updates": "25", "gnorm": null, "lr": "nan"}'
    assert numbers(line) == ("train_inner", {"epoch": 1, "ppl": 5051.4, "num_updates": 25})
    simple = AT + "train_inner | epoch 001:     25 / 300 loss=9.3, ppl=1e+03, num_updates=25, lr=5e-05"
    assert numbers(simple) == (
        "train_inner",
        {"epoch": 1, "loss": 9.3, "ppl": 1000, "num_updates": 25, "lr": 5e-5},
    )
    valid = AT + "valid | epoch 002 | valid on 'valid' subset | loss 6.1 | ppl 68.5 | num_updates 300"
    assert numbers(valid) == ("valid", {"epoch": 2, "loss": 6.1, "ppl": 68.5, "num_updates": 300})
    assert numbers(AT + 'train | {"train_loss": "6.1", "train_num') is None, "cut short"
    assert numbers(AT + "fairseq.trainer | Saving checkpoint") is None


def log(folder: Path, *records: tuple[str, dict[str, object]]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [f"{AT}{group} | {json.dumps(record)}\n" for group, record in records]
    (folder / "train.log").write_text("".join(lines))
    return folder


def record(update: int, ppl: float, **more: object) -> dict[str, object]:
    return {"num_updates": str(update), "ppl": str(ppl), **more}


def test_a_run(tmp_path: Path) -> None:
    moe = {
        "moe_decoder_experts_per_token": 2.0,
        "moe_encoder_experts_per_token": 4.0,
        "moe_encoder_flops_vs_dense_ffn": 1.1,
    }
    folder = log(
        tmp_path / "run",
        ("train_inner", record(2, 90, ups="4", **{**moe, "moe_encoder_experts_per_token": 7.0})),
        ("train_inner", record(4, 70, ups="2", **moe)),
        (
            "valid",
            {f"valid_{key}": value for key, value in record(4, 60, moe_encoder_experts_per_token=9).items()},
        ),
        ("train_inner", record(4, 71, ups="2", **moe)),  # of a run that was resumed
    )
    run = read_run(folder, "name")
    assert run.learning == [(4, 60)] and run.curves["train_inner"] == [(2, 90), (4, 71)]
    assert list(run.experts.items()) == [("encoder", [(2, 7), (4, 4)]), ("decoder", [(2, 2), (4, 2)])]
    assert run.flops == {"encoder": 1.1} and run.seconds == 0.375
    assert read_run(tmp_path, "none") is None
    (folder / "train.log").write_text("Traceback\n")
    assert read_run(folder, "empty") is None


def test_loads_by_layer(tmp_path: Path) -> None:
    lines = [
        {"updates": update, "set": kind, "layers": {"decoder.layers.1": {"tokens": 4, "rows": [update, 2]}}}
        for update, kind in ((6, "training"), (2, "training"), (2, "valid"))
    ]
    (tmp_path / "moe_load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert experts_of_layers(tmp_path, {LAYER.name: 1}) == {LAYER.name: [(2, 2), (6, 3)]}
    for text in ("{", '{"set": "training"}', '"training"'):
        (tmp_path / "moe_load.jsonl").write_text(text)
        with pytest.raises(UserError, match="moe_load.jsonl: is damaged, or of another model; move it away"):
            experts_of_layers(tmp_path, {LAYER.name: 1})


QUALITY = {"thresholds": [0.5], "experts_per_token": 2.0, "flops": 0.5, "perplexity": 61.0}
REPORT = {
    "about": {"checkpoint": "a.pt"}, "reference": {"name": "as it is", **QUALITY},
    "rows": {"chosen": QUALITY}, "curve": [QUALITY, {**QUALITY, "flops": 0.25}],
}  # fmt: skip


def test_reports_of_thresholds(tmp_path: Path) -> None:
    for name, content in {
        "a.picked": REPORT, "b": REPORT, "c": {**REPORT, "about": {"checkpoint": "c.pt"}},
        "run": {"task": "lm"}, "list": [1], "scores": {"about": "b"},
        "more": {"about": {"checkpoint": "a.pt"}},
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    assert [*threshold_reports(tmp_path / "a.pt")] == ["a.picked.json", "b.json"]
    assert [*threshold_reports(tmp_path / "c.pt")] == ["c.json"]
    figures, tables = beside(tmp_path / "c.pt", None, [], [LAYER])
    assert "validation perplexity" in figures["quality"]
    assert tables == {
        "thresholds": {
            "caption": "Thresholds",
            "head": ("setting", "t", "experts per token", "FLOPs / dense FFN", "perplexity"),
            "rows": [
                ["as it is", "0.5", "2.00", "0.500", "61.00"],
                ["chosen", "0.5", "2.00", "0.500", "61.00"],
            ],
        }
    }


def test_what_is_missing_is_said_and_runs_have_names_that_differ(tmp_path: Path) -> None:
    figures, tables = beside(tmp_path / "a.pt", *read_runs(tmp_path, []), [LAYER])
    assert "<svg" in figures["loads"] and tables == {}
    assert "no train.log or moe_load.jsonl beside" in figures["experts"]
    assert "xmoe-threshold" in figures["quality"] and "--runs adds others" in figures["learning"]
    one, two = (tmp_path / name / "run" for name in ("one", "two"))
    for folder in (one, two):
        folder.parent.mkdir()
        log(folder, ("train_inner", record(2, 90, moe_experts_per_token=3)), ("train_inner", record(4, 80)))
    figures, tables = beside(one / "a.pt", *read_runs(one, [two, one]), [LAYER])
    assert [row[:3] for row in tables["runs"]["rows"]] == [[str(each), "4", "80.00"] for each in (one, two)]
    assert "all layers" in figures["experts"] and str(two) in figures["learning"]
    with pytest.raises(
        UserError, match="--runs must be folders with train.log, what fairseq-train printed, got"
    ):
        read_runs(one, [tmp_path])
