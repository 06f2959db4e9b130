"""No string, file or archive that fairseq is given runs code; and a look at all places where it could."""

import importlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import file_utils, utils
from fairseq.data import fasta_dataset
from fairseq.models import fconv, transformer_lm
from fairseq.models.speech_to_text import xm_transformer
from fairseq.optim import adam
from fairseq_cli import eval_lm

from xmoe_fairseq_compat import untrusted
from xmoe_fairseq_compat.errors import CheckpointError, FlagError, UserError


def test_strings_of_a_configuration_are_literals_not_code(tmp_path: Path) -> None:
    """evaluate_literals_only"""
    assert utils.eval_str_list("20000,60000", type=int) == [20000, 60000]
    assert utils.eval_str_dict("{'a': 1}") == {"a": 1}
    assert utils.eval_bool("True") is True
    assert utils.eval_bool(True) is True  # a task's, read from a checkpoint
    assert utils.eval_bool(False) is False and utils.eval_bool(None, default=True) is True
    assert fconv.eval("[(512, 3)] * 2 + [(8, 1)]") == [(512, 3), (512, 3), (8, 1)]
    assert fconv.eval("1024 * 2048 - 1") == 1024 * 2048 - 1
    assert transformer_lm.eval("[(1, 64), (2, 128)]") == [(1, 64), (2, 128)]
    assert adam.eval("(0.9, 0.98)") == (0.9, 0.98)
    made = tmp_path / "made"
    code = f"__import__('os').mkdir({str(made)!r}) or [1]"
    for evaluate in (utils.eval_str_list, fconv.eval, transformer_lm.eval, adam.eval, eval_lm.eval):
        with pytest.raises(FlagError, match="^a setting must be written out") as error:
            evaluate(code)
        assert "\n" not in str(error.value)
    assert not made.exists()


@pytest.mark.parametrize(
    "text", ["[0] * 10**9", "[0] * 1000000000", "1000000000 * 'a'", "(" * 500, "{", "a.b"]
)
def test_literals_that_are_none_or_too_long(text: str) -> None:
    with pytest.raises(FlagError):
        untrusted.literal(text)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_load_runs_code_whatever_the_environment(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """load_weights_only"""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"model": Touch(trace)}, file, _use_new_zipfile_serialization=zipped)
    for module in ("models.speech_to_text.xm_transformer", "models.text_to_speech.vocoder"):
        with pytest.raises(CheckpointError, match="not on the list of types"):
            importlib.import_module(f"fairseq.{module}").torch.load(file)
    assert xm_transformer.torch.cat is torch.cat
    assert not trace.exists()
    assert pickle.loads(pickle.dumps(Touch(trace))) is None and trace.exists(), "the trap works"


FASTA = b">one\nACGT\nAC\n>two x\n\nA\n>none\n>last\nGG"


def test_fasta_files_are_read_without_a_shell(tmp_path: Path) -> None:
    """read_fasta_without_a_shell"""
    trace = tmp_path / "trace"
    folder = tmp_path / f"$(touch {trace})".replace("/", "_")
    folder.mkdir()
    prefix = folder / "a;touch trace;$(touch trace)"
    Path(f"{prefix}.fasta").write_bytes(FASTA)
    data = fasta_dataset.FastaDataset(str(prefix))
    assert data.offsets.tolist() == [0, 13, 23, 29] and data.sizes.tolist() == [6, 1, 0, 2]
    assert data.offsets.dtype == data.sizes.dtype == np.int64
    assert [data[number] for number in range(4)] == [
        (">one", "ACGTAC"), (">two x", "A"), (">none", ""), (">last", "GG"),
    ]  # fmt: skip
    assert not trace.exists() and not Path("trace").exists()


def archive(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file


def test_an_archive_stays_and_is_unpacked_beside(tmp_path: Path) -> None:
    """keep_archives"""
    file = archive(tmp_path / "x.tar.gz", {"model/dict.txt": b"a 1\n", "model/model.pt": b"weights"})
    content = file.read_bytes()
    folder = file_utils.load_archive_file(str(file))
    assert Path(folder, "model.pt").read_bytes() == b"weights" and file.read_bytes() == content
    assert file_utils.load_archive_file(str(file)) == folder, "the second time nothing is unpacked"
    assert file_utils.load_archive_file(folder) == folder
    with pytest.raises(UserError, match="none.tar.gz does not exist"):
        file_utils.load_archive_file(str(tmp_path / "none.tar.gz"))
    flat = archive(tmp_path / "y.tar.gz", {"dict.txt": b"a 1\n", "model.pt": b"weights"})
    assert Path(file_utils.load_archive_file(str(flat)), "dict.txt").read_bytes() == b"a 1\n"


@pytest.mark.parametrize("name", ["../outside", "a/../../outside"])
def test_an_archive_writes_nothing_outside(name: str, tmp_path: Path) -> None:
    """keep_archives"""
    (tmp_path / "in").mkdir()
    file = archive(tmp_path / "in" / "x.tar.gz", {"model/dict.txt": b"a 1\n", name: b"evil"})
    with pytest.raises(UserError, match=f"^{file}: it cannot be unpacked safely: ") as error:
        file_utils.load_archive_file(str(file))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "x.tar.gz"]


def test_an_archive_that_expands_a_thousandfold_is_refused(tmp_path: Path) -> None:
    file = archive(tmp_path / "x.tar.gz", {"model/model.pt": bytes(2**24)})
    with pytest.raises(UserError, match="would become 16,777,728 or more; do not use it"):
        file_utils.load_archive_file(str(file))
    file.write_bytes(b"no archive")
    with pytest.raises(UserError, match="it cannot be unpacked safely"):
        file_utils.load_archive_file(str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar.gz"]
