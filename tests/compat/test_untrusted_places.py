"""A look at all places where fairseq could run code, or write a file, for somebody else."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from fairseq import file_utils
from fairseq.data import fasta_dataset

from xmoe_fairseq_compat import checkpoints, untrusted

FAIRSEQ = Path(file_utils.__file__).parent
CALLS = {
    "eval", "exec", "__import__", "compile", "torch.load", "torch.hub.load", "pickle.load", "pickle.loads",
    "pickle.Unpickler", "yaml.load", "joblib.load", "os.system", "os.popen", "subprocess.run",
    "subprocess.call", "subprocess.Popen", "subprocess.check_call", "subprocess.check_output",
    "importlib.import_module", "extractall", "shell=True", "allow_pickle=True",
}  # fmt: skip


# Where fairseq calls one of these and it is patched; test_what_is_patched looks whether it is.
PATCHED = {
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


def test_whatever_could_run_code_is_patched_or_cannot_be_reached() -> None:
    places = found()
    assert ("criterions/ctc.py", "eval") in places and len(places) > 40
    known = PATCHED.keys() | UNREACHABLE.keys()
    unknown = {f"{file} {what}" for file, what in places if what not in known} - known
    assert not unknown, "new in this fairseq: patch it, or say above why nobody reaches it"
    assert known <= {what for _, what in places} | {f"{file} {what}" for file, what in places}


def test_what_is_patched() -> None:
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
    assert hasattr(file_utils.load_archive_file, "__wrapped__"), "keep_archives"


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
