"""steps.sh: what is done stays done, what was interrupted is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import DEADLINE
from prep_scripts import PREP

SCRIPT = f"""
set -euo pipefail
. "{PREP}/steps.sh"
STEPS_DIR=$PWD/.steps STEP_PREFIX="[t]"
slow() {{ tr a-z A-Z <b >c.partial; sleep "${{SLOW:-0}}"; mv c.partial c; }}
step first a -- b -- cp a b
step second b -- c -- slow
step third c -- d -- cp c d
echo "skipped ${{STEPS_SKIPPED:-0}}"
"""


class Runner:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "steps_test.sh").write_text(SCRIPT)
        (folder / "a").write_text("text\n")

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "steps_test.sh"],
            cwd=self.folder,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def steps(self) -> list[str]:
        process = self.start()
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, err
        return out.replace("[t] ", "").splitlines()


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_a_second_run_does_nothing(runner: Runner) -> None:
    assert runner.steps() == ["first", "second", "third", "skipped 0"]
    assert runner.steps() == ["skipped 3"]
    assert (runner.folder / "d").read_text() == "TEXT\n"


def test_a_killed_step_is_done_again_and_finished_ones_are_not(runner: Runner) -> None:
    process = runner.start(SLOW="600")
    end = time.monotonic() + DEADLINE
    while not (runner.folder / "c.partial").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (runner.folder / "c").exists() and not (runner.folder / ".steps" / "second").exists()
    assert runner.steps() == ["second", "third", "skipped 1"]
    assert (runner.folder / "d").read_text() == "TEXT\n"


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("a", ["first", "second", "third", "skipped 0"]),  # a new input
        ("c", ["second", "third", "skipped 1"]),  # an output that someone changed
        ("d", ["third", "skipped 2"]),
    ],
)
def test_a_changed_file_repeats_what_depends_on_it(runner: Runner, name: str, again: list[str]) -> None:
    runner.steps()
    (runner.folder / name).write_text("other text\n")
    assert runner.steps() == again


def test_a_changed_command_or_a_lost_output_repeats_the_step(runner: Runner) -> None:
    runner.steps()
    script = runner.folder / "steps_test.sh"
    script.write_text(script.read_text().replace("cp c d", "cp -p c d"))
    assert runner.steps() == ["third", "skipped 2"]
    (runner.folder / "b").unlink()
    assert runner.steps() == ["first", "second", "third", "skipped 0"]


@pytest.mark.parametrize(
    ("edited", "again"),
    [("main", True), ("helper", True), ("folder/__init__", True), ("folder/deep", True), ("other", False)],
)
def test_an_edited_module_repeats_what_imports_it(runner: Runner, edited: str, again: bool) -> None:
    """Wherever it is imported: here by a module of a package, inside a function."""
    (runner.folder / "folder").mkdir()
    texts = {
        "main": "import helper\nopen('out', 'w')",
        "helper": "def f():\n    from folder import deep",
        "folder/__init__": "",
        "folder/deep": "import json, numpy",
        "other": "import main",
    }
    for name, text in texts.items():
        (runner.folder / f"{name}.py").write_text(text + "\n")
    script = runner.folder / "steps_test.sh"
    script.write_text(SCRIPT.partition("step first")[0] + 'step it -- out -- "${PYTHON:-python3}" main.py\n')
    assert runner.steps() == ["it"]
    assert runner.steps() == []
    with (runner.folder / f"{edited}.py").open("a") as file:
        file.write("# edited\n")
    assert runner.steps() == (["it"] if again else [])


def test_an_edited_function_of_the_shell_repeats_its_step(runner: Runner) -> None:
    runner.steps()
    script = runner.folder / "steps_test.sh"
    script.write_text(script.read_text().replace("tr a-z A-Z", "tr a-z B-ZA"))
    assert runner.steps() == ["second", "third", "skipped 1"]


def test_what_a_script_imports_is_found_and_nothing_runs() -> None:
    from imported import files

    names = {Path(file).relative_to(PREP).as_posix() for file in files(PREP / "extract_pairs.py")}
    assert {
        "extract_pairs.py",
        "textio.py",
        "pair_rules.py",
        "formats/markup.py",
        "formats/blocks.py",
    } <= names
    assert "clean_pairs.py" not in names


def test_a_failing_step_stops_the_script_and_leaves_no_stamp(runner: Runner) -> None:
    (runner.folder / "d").mkdir()
    (runner.folder / "d" / "c").mkdir()  # so cp c d fails
    process = runner.start()
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0 and "skipped" not in out
    assert "[t] third failed" in err and not (runner.folder / ".steps" / "third").exists()


def test_a_missing_input_is_named(runner: Runner) -> None:
    (runner.folder / "a").unlink()
    process = runner.start()
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert err.count("\n") == 1 and "first: an input is missing" in err and "'a'" in err
