"""scripts/setup.sh: its usage, and which line of a failure it shows."""

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts/setup.sh"
CONFLICT = """ERROR: Cannot install None because these package versions have conflicting dependencies.

The conflict is caused by:
    xmoe-fairseq 0.1.0 depends on bitarray<3

Additionally, some packages in these conflicts have no matching distributions available for your environment:
    bitarray

ERROR: ResolutionImpossible: for help visit https://pip.pypa.io
"""
NO_NETWORK = "no connection to the package registry; is there a network?"
NOT_OFFERED = "the package registry offers no bitarray; is there a network, and is pip's index the right one?"


def with_functions(body: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    functions = SETUP.read_text().removesuffix("main\n").replace("${BASH_SOURCE[0]}", str(SETUP))
    (folder / "functions.sh").write_text(functions)
    command = ["bash", "-c", f". ./functions.sh; {body}"]
    return subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        (CONFLICT, NOT_OFFERED),
        ("WARNING: Retrying after 'NewConnectionError(...)'\n" + CONFLICT, NO_NETWORK),
        ("ERROR: No matching distribution found for bitarray\n", NOT_OFFERED),
        (
            "some words\nERROR: Could not build wheels for fairseq\nmore",
            "ERROR: Could not build wheels for fairseq",
        ),
        ("the last line", "the last line"),
    ],
)
def test_the_reason_of_a_failure(tmp_path: Path, printed: str, reason: str) -> None:
    (tmp_path / "printed").write_text(printed)
    body = """log=$PWD/log; failing() { cat printed; false; }; logged "installing" failing"""
    done = with_functions(body, tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"setup: installing failed: {reason} (log: {tmp_path}/log)\n"


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("-h", 0), ("--hlp", 2)])
def test_an_argument_sets_nothing_up(tmp_path: Path, argument: str, status: int) -> None:
    environment = {**os.environ, "VENV": str(tmp_path / "venv")}
    done = subprocess.run(["bash", str(SETUP), argument], env=environment, capture_output=True, text=True)
    usage = done.stderr if status else done.stdout
    assert done.returncode == status and "    VENV=/some/folder bash scripts/setup.sh    elsewhere" in usage
    assert usage.endswith("a further one a second or less.\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("compiler", "is_there"), [("sh -m64", True), ("no-such-compiler -m64", False)])
def test_the_compiler_may_have_arguments(compiler: str, is_there: bool, tmp_path: Path) -> None:
    said = with_functions("python=no-such-python; check_build_tools", tmp_path, CXX=compiler).stderr
    assert (f"no C++ compiler '{compiler}', to build fairseq; install one" in said) != is_there
    assert ("'no-such-python' has no venv module" in said) == is_there
