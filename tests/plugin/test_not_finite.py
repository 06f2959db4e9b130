"""Numbers that overflow, from the command line: one line that says where."""

from pathlib import Path

import pytest
from commands import PLUGIN, TINY_MT, TRAIN, run

DENSE = (
    *PLUGIN, "--task", "translation", "--arch", "transformer_tiny", "--batch-size", "8", "--criterion",
    "label_smoothed_cross_entropy",
)  # fmt: skip


@pytest.mark.parametrize("model", [TINY_MT, DENSE], ids=["MoE", "dense"])
def test_gradients_that_overflow_name_a_parameter(
    model: tuple[str, ...], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = (*model, *TRAIN, "--save-dir", tmp_path, "--disable-validation", "--lr", 1e6, "--clip-norm", 0)
    output = run("fairseq-train", corpus[0], *flags, "--no-save", "--max-update", 20, succeeds=False)
    last = output.strip().splitlines()[-1]
    assert last.startswith("fairseq-train: error: gradients of ")
    assert ", the first encoder.embed_tokens.weight" in last
    assert "Traceback" not in output
