"""dense_to_sparse.sh: from binarised text to a table of conversions and their scores."""

import json
from pathlib import Path

import pytest
from commands import script

SMALL = {
    "LAYERS": "1", "WIDTH": "16", "FFN": "64", "SPLIT": "8", "GROUPINGS": "random", "UPDATES": "3",
    "FINETUNE": "1",
}  # fmt: skip


@pytest.mark.parametrize("task", ["lm", "mt"])
def test_trains_converts_and_scores(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data, out = request.getfixturevalue(f"{task}_data"), tmp_path / "out"
    said = script("dense_to_sparse.sh", task, data, out, **SMALL)
    assert "| random | 8 | one for all layers | 1 updates of all |" in said
    scores = json.loads((out / "scores" / "scores.json").read_text())
    assert list(scores) == ["dense", "random-0", "random-1"]
    assert {*scores["dense"]} == ({"test perplexity"} if task == "lm" else {"test bleu", "test chrf"})
    if task == "lm":  # 3 updates are next to nothing: about as many as there are words to choose from
        assert all(1 < found["test perplexity"] < 500 for found in scores.values())
