"""Checkpoints of plain types open, others are refused in one line."""

import argparse
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils

from xmoe_fairseq_compat.errors import CheckpointError


class Stranger:
    pass


def test_plain_types_in_a_checkpoint() -> None:
    state = {
        "args": argparse.Namespace(lr=1),
        "loss": np.float64(2),
        "ids": np.arange(3),
        "flag": np.bool_(1),
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["args"] == state["args"] and loaded["loss"] == 2 and loaded["ids"].tolist() == [0, 1, 2]


def test_numpy_1_and_2_names_in_a_checkpoint() -> None:
    file = io.BytesIO()
    torch.save({"loss": np.float32(2)}, file, _use_new_zipfile_serialization=False)
    for core in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        named = file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        named = named.replace(b"numpy.core.multiarray", core)
        assert torch.load(io.BytesIO(named), weights_only=True)["loss"] == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"model": {}, "extra": Stranger()}, "it holds .*Stranger, which is not on the list of types"),
        ({"model": {}, "extra": os.system}, "it holds posix.system, which is not on the list of types"),
        ({"weight": torch.ones(1)}, "it has no entry 'model'"),
        ({"model": {}}, "it has no entry 'cfg'"),
        ({"model": {}, "cfg": {}}, "it has no entry 'optimizer_history'"),
        (b"", "it is damaged or no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1", "it is damaged or no checkpoint"),
        (b"error 404: not found", "it is damaged or no checkpoint"),
        (pickle.dumps({"model": Stranger()}, protocol=2), "it holds .*Stranger"),
    ],
)
def test_refused_checkpoints(content: object, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=f"cannot load checkpoint {file}: {problem}") as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(file))
    assert "\n" not in str(error.value)


def test_truncated_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save({"model": {"weight": torch.ones(1000)}}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match="it is damaged or no checkpoint"):
        checkpoint_utils.load_checkpoint_to_cpu(str(file))


def test_missing_checkpoint_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "none.pt"))
