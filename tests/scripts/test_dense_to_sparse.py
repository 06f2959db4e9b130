"""dense_to_sparse.sh: from binarised text to a table of conversions and their scores."""

import json
from pathlib import Path

import pytest
from commands import script

SMALLER = [
    f"--{side}-{size}"
    for side in ("encoder", "decoder")
    for size in ("layers=1", "embed-dim=16", "ffn-embed-dim=64")
]


@pytest.mark.parametrize("task", ["lm", "mt"])
def test_trains_converts_and_scores(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tuning = 1 if task == "lm" else 0  # which is no conversion of its own
    data, out = request.getfixturevalue(f"{task}_data"), tmp_path / "out"
    said = script(
        "dense_to_sparse.sh", task, data, out, *(SMALLER if task == "mt" else SMALLER[3:]), "--max-update", 3,
        SPLIT="8", GROUPINGS="random", FINETUNE=str(tuning),
    )  # fmt: skip
    ways = {0: "none", 1: "1 updates of all"}
    for updates in {0, tuning}:
        assert f"| random | 8 | one for all layers | {ways[updates]} |" in said
    scores = {path.name: json.loads(path.read_text()) for path in (out / "dense").glob("scores.*.json")}
    assert {*scores} == {f"scores.{tag}.json" for tag in ("last", "random-0", f"random-{tuning}")}
    assert not [*out.rglob("explain*")]  # a page for each takes longer than its scores
    for found in scores.values():
        assert {*found["splits"]} == {"test"}
        if task == "lm":  # 3 updates are next to nothing: about as many as there are words to choose from
            assert 1 < found["splits"]["test"]["perplexity"] < 500
    columns = ("perplexity", "bleu", "chrf") if task == "mt" else ("perplexity",)
    assert " | ".join(["budget 1", *(f"test {name}" for name in columns)]) + " |\n" in said
