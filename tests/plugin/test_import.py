"""The plugin registers itself in whatever order it and fairseq are imported; the core needs no fairseq."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import DEADLINE, PLUGIN

Python = Callable[[str], str]

LOAD_USER_DIR = (
    "import fairseq.utils; from argparse import Namespace; "
    f"fairseq.utils.import_user_module(Namespace(user_dir={PLUGIN[1]!r}))"
)
PRINT_REGISTERED = (
    "from fairseq.models import ARCH_MODEL_REGISTRY\n"
    "from fairseq.criterions import CRITERION_REGISTRY\n"
    "print(sorted(n for n in (*ARCH_MODEL_REGISTRY, *CRITERION_REGISTRY) if 'moe' in n))\n"
)
REGISTERED = sorted(
    ["moe_adaptive_loss", "moe_cross_entropy", "moe_label_smoothed_cross_entropy"]
    + ["xmoe_transformer", "xmoe_transformer_lm"]
    + [f"xmoe_transformer_{size}" for size in ("tiny", "iwslt_de_en", "wmt_en_de", "wmt_en_de_big")]
    + [f"xmoe_transformer_lm_{size}" for size in ("tiny", "gpt2_small", "gpt2_medium")]
)


# Runs programs, each in a fork that has torch alone, which takes 2 s to import. A line has two files: the
# program, and what it prints.
FORKS = f"""
import os, signal, sys, torch
for line in sys.stdin:
    program, printed = line.rstrip().split(chr(9))
    if not (fork := os.fork()):
        signal.alarm({DEADLINE:.0f})
        with open(printed, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        exec(open(program).read(), {{"__name__": "__main__"}})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)
"""


def anew(code: str) -> str:
    """What a program prints in a process of its own; AssertionError if it fails."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Python]:
    """The same in a process that has imported torch."""
    folder = tmp_path_factory.mktemp("programs")
    program, printed = folder / "program", folder / "printed"
    words = [sys.executable, "-c", FORKS]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:

        def run(code: str) -> str:
            assert forks.stdin and forks.stdout
            program.write_text(code)
            print(program, printed, sep="\t", file=forks.stdin, flush=True)
            assert int(forks.stdout.readline()) == 0, printed.read_text()
            return printed.read_text()

        yield run


@pytest.mark.parametrize(
    "first, then",
    [
        ("import xmoe_fairseq, fairseq", LOAD_USER_DIR),
        ("import xmoe_fairseq, importlib; importlib.reload(xmoe_fairseq)\nimport fairseq", LOAD_USER_DIR),
        (LOAD_USER_DIR, "import xmoe_fairseq"),
    ],
    ids=["the package first", "reloaded", "fairseq first"],
)
def test_models_and_criterions_are_registered(python: Python, first: str, then: str) -> None:
    """By the first of the two ways to load the plugin; the second finds it loaded."""
    output = python(f"{first}\n{PRINT_REGISTERED}{then}\n{PRINT_REGISTERED}")
    assert [line for line in output.splitlines() if line.startswith("[")] == [str(REGISTERED)] * 2


def test_the_name_of_the_installed_package_will_do_in_any_folder(python: Python, tmp_path: Path) -> None:
    """user_dir_may_be_installed"""
    by_name = LOAD_USER_DIR.replace(repr(PLUGIN[1]), "'xmoe_fairseq'")
    output = python(f"import os; os.chdir({str(tmp_path)!r})\n{by_name}\n{PRINT_REGISTERED}")
    assert output.splitlines()[-1] == str(REGISTERED)
    with pytest.raises(AssertionError, match="--user-dir must be a folder .*, got no_such_package"):
        python(by_name.replace("xmoe_fairseq", "no_such_package"))


USE_THE_CORE = (
    "from xmoe_fairseq.moe import MoELayer, ThresholdRouter\n"
    "import torch\n"
    "y, routing = MoELayer(8, 4, 6, ThresholdRouter(8, 6))(torch.randn(2, 3, 8))\n"
    "assert y.shape == (2, 3, 8) and routing.experts_per_token >= 1\n"
)


def test_the_core_imports_torch_and_none_of_what_the_plugin_needs() -> None:
    output = anew(f"{USE_THE_CORE}import sys; print(*{{name.partition('.')[0] for name in sys.modules}})")
    assert {"torch", "xmoe_fairseq"} < {*output.split()}
    assert {*output.split()}.isdisjoint(
        {"fairseq", "hydra", "omegaconf", "scipy", "fairscale", "sentencepiece", "sacrebleu"}
    )


def test_an_import_neither_loads_nor_builds_the_native_library(python: Python) -> None:
    """The first call loads it; nothing but its own command builds it."""
    output = python(
        "import sys, torch\n"
        "started = []\n"
        "sys.addaudithook(lambda event, _: started.append(event) if event == 'subprocess.Popen' else None)\n"
        "import xmoe_fairseq, xmoe_fairseq.moe\n"
        "from xmoe_fairseq.moe.native import missing\n"
        "loaded = lambda: 'native/experts-' in open('/proc/self/maps').read()\n"
        f"before = loaded()\n{USE_THE_CORE}"
        "print(before, loaded() == (missing() == ''), started)\n"
    )
    assert output.splitlines()[-1] == "False True []"


@pytest.mark.parametrize(
    "module", ["config", "models.translation", "criterions", "build_moe", "parallel.checkpoint_command"]
)
def test_whichever_module_is_imported_first_all_is_registered_and_each_module_runs_once(
    python: Python, module: str
) -> None:
    """Also one that models/ imports, and that imports fairseq."""
    output = python(
        f"import xmoe_fairseq.{module} as module\n"
        "from xmoe_fairseq import build_moe, transformer_layers\n"
        "assert build_moe.build_moe is transformer_layers.build_moe\n"
        "assert module.__spec__.origin == module.__file__\n"
        f"{PRINT_REGISTERED}"
    )
    assert output.splitlines()[-1] == str(REGISTERED)


# As if fairseq were not installed.
WITHOUT_FAIRSEQ = (
    "import importlib.metadata as metadata\n"
    "version = metadata.version\n"
    "metadata.version = lambda name: version('no-such-package' if name == 'fairseq' else name)\n"
)


def test_the_core_works_without_fairseq_and_what_needs_it_says_so_in_one_line(python: Python) -> None:
    output = python(
        f"{WITHOUT_FAIRSEQ}{USE_THE_CORE}"
        "for module in ('models', 'criterions', 'config'):\n"
        "    try:\n"
        "        __import__(f'xmoe_fairseq.{module}')\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    lines = output.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "fairseq 0.12.2" in line and "pip install --no-deps fairseq==0.12.2" in line, line


def test_the_core_works_beside_another_fairseq_and_as_its_user_dir_the_plugin_says_which_it_needs(
    python: Python, tmp_path: Path
) -> None:
    (tmp_path / "fairseq-0.10.2.dist-info").mkdir()
    (tmp_path / "fairseq-0.10.2.dist-info" / "METADATA").write_text("Name: fairseq\nVersion: 0.10.2\n")
    (tmp_path / "fairseq.py").touch()
    there = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    assert (
        python(f"{there}{USE_THE_CORE}import fairseq; print(fairseq.__file__)") == f"{tmp_path}/fairseq.py\n"
    )
    with pytest.raises(
        AssertionError, match="xmoe_fairseq needs fairseq 0.12.2, found 0.10.2; run: python -m "
    ):
        python(f"{there}import fairseq, xmoe_fairseq")
