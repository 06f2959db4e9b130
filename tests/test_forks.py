"""A fork that stands in for a Python process does what that would."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DEADLINE
from forks import tools

SEEN = """
import multiprocessing, os, sys
print([sys.argv[0].rpartition("/")[2], *sys.argv[1:]], os.getcwd(), os.environ["WORD"], sys.stdin.read())
print(sys.path[0], __name__, multiprocessing.get_context().get_start_method())
with os.fdopen(3, "w") as further:
    print("and 3", file=further)
print("to stderr", file=sys.stderr)
"""
ENDS = [
    SEEN,
    "import sys; sys.exit(5)",
    "import sys; sys.exit('a line')",
    "import os; os.kill(os.getpid(), 9)",
    "raise LookupError('why')",
    "import os, sys; os.execv(sys.executable, [sys.executable, '-S', '-c', 'print(7)'])",
    "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import sys; sys.exit(4)']))",
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('later'))).start()",
]


@pytest.mark.parametrize("way", ["-c", "-m", "file"])
@pytest.mark.parametrize("code", ENDS)
def test_as_a_process(code: str, way: str, tmp_path: Path) -> None:
    (tmp_path / "a_script.py").write_text(code)
    words = {"-c": ["-c", code], "-m": ["-m", "a_script"], "file": ["./a_script.py"]}[way]
    ended = []
    for python in (sys.executable, tools() / "python"):
        command = ["bash", "-c", 'exec "$@" 3>further', "bash", str(python), *words, "one", "2"]
        done = subprocess.run(
            command, input="read", capture_output=True, text=True, cwd=tmp_path, timeout=DEADLINE,
            env={**os.environ, "WORD": "ü\n", "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        further = (tmp_path / "further").read_text()
        ended.append((done.returncode, done.stdout, further, *done.stderr.splitlines()[-1:]))
    assert ended[0] == ended[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on(number: int) -> None:
    code = "import signal; signal.signal(2, lambda *_: exit(7)); print('there', flush=True); signal.pause()"
    with subprocess.Popen([tools() / "python", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"there\n"
        process.send_signal(number)
        assert process.wait(DEADLINE) == {signal.SIGINT: 7, signal.SIGTERM: -number}[number]
