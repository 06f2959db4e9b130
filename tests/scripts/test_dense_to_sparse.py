"""dense_to_sparse.sh: from binarised text to a table of conversions and their scores."""

import json
from pathlib import Path

import pytest
import torch
from commands import script

SMALLER = [
    f"--{side}-{size}"
    for side in ("encoder", "decoder")
    for size in ("layers=1", "embed-dim=16", "ffn-embed-dim=64")
]


@pytest.mark.parametrize(
    "task, ways",
    [
        ("lm", ["hoyer+probability+shared+hidden+distill+half", "split+half", "split+probability+trained"]),
        ("mt", ["relative+half+wide+trained"]),
    ],
)
def test_trains_converts_and_scores(
    task: str, ways: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data, out = request.getfixturevalue(f"{task}_data"), tmp_path / "out"
    smaller = SMALLER if task == "mt" else ["--decoder-layers=2", *SMALLER[4:]]  # of which one has experts
    sizes = {"SPLIT": "8", "HIDDEN": "2", "FINETUNE": "2", "UPDATES": "10", "CALIBRATION": "400"}
    settings = {**sizes, "WAYS": " ".join(ways)}
    if task == "mt":
        settings["TENTHS"] = "8"
    smaller = [*smaller, "--save-interval-updates=5"]
    said = script("dense_to_sparse.sh", task, data, out, *smaller, **settings)
    report = (out / "ways.md").read_text()
    assert report in said
    table = [line.strip("|").split("|") for line in report.splitlines() if "---" not in line]
    rows = {cells[0].strip(): cells for cells in table}
    others = ["dense after hoyer", "t = 1"] if task == "lm" else []
    assert [*rows] == ["way", "dense", *others, *ways]
    further = {
        "hoyer+probability+shared+hidden+distill+half": "the last 1 updates, anew + 2 updates",
        "split+half": "all of it, in parts",
        "split+probability+trained": "all of it, in parts; t steered in the last 1 updates",
        "relative+half+wide+trained": "the last 2 updates, anew",
    }  # fmt: skip
    assert {way: rows[way][1].strip() for way in ways} == {way: further[way] for way in ways}
    for file in (out / "dense").glob("scores.*.json"):
        (found,) = json.loads(file.read_text())["splits"].values()
        assert found["perplexity"] > 1 and ("bleu" in found) == (task == "mt")
    if task == "lm":  # of 8: half, and a quarter
        assert float(rows["t = 1"][2]) == 8
        assert float(rows["split+half"][2]) == pytest.approx(4, abs=0.3)
        about = json.loads((out / "split+probability+trained/run.json").read_text())["command"]
        assert about[about.index("--moe-target-experts-per-token") + 1] == "2"
        assert about[about.index("--moe-threshold-rule") + 1] == "probability"
        for run in ("split", "split+probability+trained"):  # the layers that conversions have
            about = json.loads((out / run / "run.json").read_text())["command"]
            assert about[about.index("--moe-freq") + 1] == "2"
    trained = [*out.glob("*trained/checkpoint_last.pt")]
    assert [
        torch.load(each, weights_only=True)["optimizer_history"][-1]["num_updates"] for each in trained
    ] == [2 if task == "mt" else 10]  # anew; on the schedule of the model in parts
    assert not [*out.rglob("explain*")]  # a page for each takes longer than its scores
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.pt")}
    script("dense_to_sparse.sh", task, data, out, *smaller, **settings)
    others = settings | {"TENTHS": "7"}
    refused = script("dense_to_sparse.sh", task, data, out, *smaller, succeeds=False, **others)
    made = f"made with TENTHS={settings.get('TENTHS', 9)}, and this is TENTHS=7; name another OUT"
    assert made in refused
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.pt")} == before
    assert (out / "ways.md").read_text() == report
    broken, other, message = {
        "lm": (
            "split/start",
            "dense/start",
            "start.pt its checkpoint of 9 updates, with experts, got start.pt",
        ),
        "mt": (
            "dense/checkpoint_last",
            "dense/start",
            "its checkpoint of 10 updates, dense, got checkpoint_last",
        ),
    }[task]
    kept = (out / f"{broken}.pt").read_bytes()
    (out / f"{broken}.pt").write_bytes((out / f"{other}.pt").read_bytes())
    refused = script("dense_to_sparse.sh", task, data, out, *smaller, succeeds=False, **settings)
    assert message in refused and "updates, dense" in refused.splitlines()[-1]
    (out / f"{broken}.pt").write_bytes(kept)
    (out / "dense/start.pt").unlink()  # as of a run that was trained elsewhere
    refused = script("dense_to_sparse.sh", task, data, out, *smaller, succeeds=False, **settings)
    begun = 8 if task == "mt" else 9
    assert f"wants as start.pt its checkpoint of {begun} updates, dense, got checkpoint_last.pt" in refused
    assert not (out / "dense/start.pt").exists()
    (out / "dense/start.pt").write_bytes((out / "dense/checkpoint_last.pt").read_bytes()[:1000])
    refused = script("dense_to_sparse.sh", task, data, out, *smaller, succeeds=False, **settings)
    assert refused.splitlines()[-1].endswith(
        "start.pt is no checkpoint of a training, or is not whole; copy it again"
    )


@pytest.mark.parametrize(
    "settings, message",
    [({"WAYS": "mass hoyer+better"}, "WAYS: better is no part of a way, in hoyer+better"),
     ({"WAYS": "split+distill"}, "WAYS: split cannot be combined with distill, in split+distill"),
     ({"WAYS": "split+mass+relative"}, "WAYS: one of mass probability relative at most in a way, got split+"),
     ({"WAYS": "random+mass+clustering"}, "WAYS: one of coactivation clustering random at most in a way"),
     ({"WAYS": "task+distill"}, "WAYS: one of task distill at most in a way, got task+distill"),
     ({"WAYS": "hoyer+l1"}, "WAYS: one of hoyer l1 at most in a way, got hoyer+l1"),
     ({"WAYS": "l1+trained"}, "WAYS: a penalty cannot be combined with trained, in l1+trained"),
     ({"WAYS": " "}, "WAYS names no way"),
     ({"WAYS": "mass +"}, "WAYS: + has no parts"),
     ({"SPLIT": "4", "WAYS": "wide+trained"}, "SPLIT=4 is too few for wide+trained: a token would take less"),
     ({"SPLIT": "all"}, "SPLIT must be a whole number above 0, got all"),
     ({"FINETUNE": "abc"}, "FINETUNE must be a whole number above 0, got abc"),
     ({"L1": "x"}, "L1 must be a number, got x"),
     ({"WAYS": ""}, "WAYS names no way"),
     ({"PRESET": "nope"}, "PRESET must be one of claims demo dense_to_sparse "),
     ({"TENTHS": "10"}, "TENTHS must be a whole number from 1 to 9, got 10"),
     ({"UPDATES": "1"}, "UPDATES must be a whole number, and TENTHS=9 tenths of it 1 at least, got 1"),
     ({"UPDATES": "1e3"}, "UPDATES must be a whole number, and TENTHS=9 tenths of it 1 at least, got 1e3")],
)  # fmt: skip
def test_settings_are_checked_before_anything_is_trained(
    settings: dict[str, str], message: str, lm_data: Path, tmp_path: Path
) -> None:
    said = script("dense_to_sparse.sh", "lm", lm_data, tmp_path, succeeds=False, **settings)
    assert message in said and said.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_arguments_are_checked(lm_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, message in (
        (("lm", lm_data), "usage: bash scripts/dense_to_sparse.sh lm|mt DATA OUT [FLAGS]; --help says more"),
        (("de", lm_data, tmp_path), "the first argument must be lm or mt, got de"),
        (
            ("lm", tmp_path, tmp_path / "out"),
            f"DATA must be a folder of data-prep with bin/ in it, got {tmp_path}",
        ),
        (("lm", lm_data, tmp_path / "file"), f"OUT must be a folder, got the file {tmp_path}/file"),
    ):
        said = script("dense_to_sparse.sh", *words, succeeds=False)
        assert said == f"dense_to_sparse: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "WAYS=" in script("dense_to_sparse.sh", "--help")
