"""No string, file or archive that fairseq is given runs code; and a look at all places where it could."""

import ast
import importlib
import io
import pickle
import tarfile
from collections.abc import Iterator
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

from xmoe_fairseq_compat import checkpoints, untrusted
from xmoe_fairseq_compat.errors import CheckpointError, FlagError, UserError

FAIRSEQ = Path(file_utils.__file__).parent
CALLS = {
    "eval", "exec", "__import__", "compile", "torch.load", "torch.hub.load", "pickle.load", "pickle.loads",
    "pickle.Unpickler", "yaml.load", "joblib.load", "os.system", "os.popen", "subprocess.run",
    "subprocess.call", "subprocess.Popen", "subprocess.check_call", "subprocess.check_output",
    "importlib.import_module", "extractall", "shell=True", "allow_pickle=True",
}  # fmt: skip
# Where fairseq calls one of these and it is mended; test_what_is_mended looks whether it is.
MENDED = {
    "eval": "each module's own name `eval` reads literals only",
    "torch.load": "each module's own name `torch` has a load that takes weights only",
    "data/fasta_dataset.py subprocess.check_output": "FastaDataset._build_index is another function",
    "data/fasta_dataset.py shell=True": "FastaDataset._build_index is another function",
    "file_utils.py extractall": "load_archive_file is another function",
}
REGISTRY = "imports the files in fairseq's own folder, whose names nobody gives"
UNREACHABLE = {
    "criterions/__init__.py importlib.import_module": REGISTRY,
    "data/audio/feature_transforms/__init__.py importlib.import_module": REGISTRY,
    "data/encoders/__init__.py importlib.import_module": REGISTRY,
    "model_parallel/criterions/__init__.py importlib.import_module": REGISTRY,
    "model_parallel/models/__init__.py importlib.import_module": REGISTRY,
    "models/__init__.py importlib.import_module": REGISTRY,
    "models/ema/__init__.py importlib.import_module": REGISTRY,
    "models/huggingface/__init__.py importlib.import_module": REGISTRY,
    "optim/__init__.py importlib.import_module": REGISTRY,
    "optim/lr_scheduler/__init__.py importlib.import_module": REGISTRY,
    "scoring/__init__.py importlib.import_module": REGISTRY,
    "tasks/__init__.py importlib.import_module": REGISTRY,
    "optim/fused_adam.py importlib.import_module": "of one name, apex's",
    "utils.py importlib.import_module": "of --user-dir, which the user's command line alone gives",
    "data/audio/data_cfg.py yaml.load": "FullLoader, which makes plain values; only audio tasks read it",
    "data/plasma_utils.py subprocess.Popen": "a program of a fixed name, no shell; of --use-plasma-view",
    "distributed/utils.py subprocess.check_output": "scontrol, no shell; of SLURM's environment",
    "distributed/utils.py pickle.loads": "of the other ranks of the same run",
    "models/speech_to_text/hub_interface.py torch.hub.load": "of speech models, which are refused",
}
# Files that write, rename or delete others, and whose names those are.
OUTPUT = "the user's command line names its output"
SOURCE = "a script of fairseq's developers, with names of its own"
WRITING = {
    "binarizer.py": OUTPUT,
    "checkpoint_utils.py": "--save-dir; and what a remote file was copied to",
    "criterions/sentence_ranking.py": "of the criterion's configuration: refused in a checkpoint",
    "data/dictionary.py": OUTPUT,
    "data/fasta_dataset.py": "an index beside the data",
    "data/huffman/huffman_coder.py": OUTPUT,
    "data/huffman/huffman_mmap_indexed_dataset.py": OUTPUT,
    "data/indexed_dataset.py": OUTPUT,
    "distributed/utils.py": "into memory",
    "fairseq_cli/generate.py": OUTPUT,
    "fairseq_cli/preprocess.py": OUTPUT,
    "file_io.py": "for the others in this table",
    "file_utils.py": "fairseq's own cache; load_archive_file is another function",
    "modules/dynamicconv_layer/cuda_function_gen.py": SOURCE,
    "modules/lightconv_layer/cuda_function_gen.py": SOURCE,
    "modules/quantization/pq/em.py": "of --quantization-config-path, in training only",
}
WRITES = {
    "remove", "unlink", "rmtree", "rm", "rename", "move", "copy", "copyfile", "makedirs", "mkdirs", "symlink",
}  # fmt: skip


def name_of(node: ast.AST) -> str:
    """`a.b.c` as it is written; "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def dangerous(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.Attribute):
            name = name_of(node)
            yield from CALLS & {name, name.rpartition(".")[2] if name.endswith(".extractall") else name}
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "pickle", "subprocess", "torch"):
            yield from CALLS & {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle"):
            yield f"{node.arg}={ast.unparse(node.value)}"


def writes(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            owner, _, function = name_of(node.func).rpartition(".")
            modes = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
            if function in ("open", "opena") and any(set(str(mode)) & set("wax+") for mode in modes):
                return True
            if function in WRITES and owner in ("os", "shutil", "PathManager"):
                return True
            if name_of(node.func) in ("np.save", "torch.save"):
                return True
    return False


def sources() -> Iterator[tuple[str, str]]:
    """(name, text) of all files of fairseq and its commands, but for its examples."""
    for folder in (FAIRSEQ, FAIRSEQ.with_name("fairseq_cli")):
        for file in folder.rglob("*.py"):
            name = str(file.relative_to(FAIRSEQ if folder == FAIRSEQ else FAIRSEQ.parent))
            if not name.startswith("examples/"):
                yield name, file.read_text()


def found() -> set[tuple[str, str]]:
    """(file, what)."""
    return {(name, what) for name, text in sources() for what in dangerous(text)}


def test_whatever_writes_a_file_has_its_name_from_the_user() -> None:
    assert {name for name, text in sources() if writes(text)} == WRITING.keys()


def test_whatever_could_run_code_is_mended_or_cannot_be_reached() -> None:
    places = found()
    assert ("criterions/ctc.py", "eval") in places and len(places) > 40
    known = MENDED.keys() | UNREACHABLE.keys()
    unknown = {f"{file} {what}" for file, what in places if what not in known} - known
    assert not unknown, "new in this fairseq: mend it, or say above why nobody reaches it"
    assert known <= {what for _, what in places} | {f"{file} {what}" for file, what in places}


def test_what_is_mended() -> None:
    """evaluate_literals_only, load_weights_only"""
    for file, what in sorted(found()):
        module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        module = module if module.startswith("fairseq_cli") else f"fairseq.{module}"
        if what == "eval":
            assert importlib.import_module(module).eval is untrusted.literal, module
        if what == "torch.load":
            load = importlib.import_module(module).torch.load
            assert load in (checkpoints.load, checkpoints.load_checkpoint), module
    assert fasta_dataset.FastaDataset._build_index.__module__ == untrusted.__name__
    assert file_utils.load_archive_file.__module__ == untrusted.__name__


def test_the_examples_of_fairseq_are_imported_by_no_text_component() -> None:
    """They hold much that could run code; only --user-dir, and components that are refused, import them."""
    importing = set()
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            importing |= {name for module in modules if (module or "").split(".")[0] == "examples"}
    assert importing == {
        "criterions/ctc.py",
        "tasks/simultaneous_translation.py",
        "tasks/speech_to_speech.py",
    }


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
