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
    functions = SETUP.read_text().removesuffix("main\n").replace("${BASH_SOURCE[0]}", str(SETUP))
    (tmp_path / "functions.sh").write_text(functions)
    (tmp_path / "printed").write_text(printed)
    body = (
        """. ./functions.sh; log=$PWD/log; failing() { cat printed; false; }; logged "installing" failing"""
    )
    done = subprocess.run(["bash", "-c", body], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"setup: installing failed: {reason} (log: {tmp_path}/log)\n"


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("-h", 0), ("--hlp", 2)])
def test_an_argument_sets_nothing_up(tmp_path: Path, argument: str, status: int) -> None:
    environment = {**os.environ, "VENV": str(tmp_path / "venv")}
    done = subprocess.run(["bash", str(SETUP), argument], env=environment, capture_output=True, text=True)
    usage = done.stderr if status else done.stdout
    assert done.returncode == status and "    VENV=/some/folder bash scripts/setup.sh    elsewhere" in usage
    assert usage.endswith("a further one a second or less.\n") and not list(tmp_path.iterdir())
