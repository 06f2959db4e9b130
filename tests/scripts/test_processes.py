"""What a script has started ends with it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ARITHMETIC, BIN, DEADLINE, REPO, commands_of, wait_until

ENVIRONMENT = {"PATH": f"{BIN}:/usr/bin:/bin", "VENV": str(BIN.parent), **ARITHMETIC}


def ended(words: list[str], is_at_work: Callable[[], object], **env: str) -> tuple[int, str]:
    """Exit status and output of a command that gets SIGTERM once it is at work."""
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT | env
    ) as process:
        try:
            wait_until(lambda: is_at_work() or process.poll() is not None)
            process.terminate()
            output, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    return process.returncode, output


def test_training_ends_with_its_script(lm_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    log = run / "train.log"
    words = ["bash", str(REPO / "scripts/lm/train.sh"), "tiny", "dense", str(lm_data), str(run)]
    flags = ["--max-update", "1000000", "--log-interval", "1", "--disable-validation"]
    status, output = ended([*words, *flags], lambda: log.exists() and "num_updates" in log.read_text())
    assert status == 143 and "Traceback" not in output, output[-2000:]
    assert not commands_of(str(run))


JOBS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from experiments.processes import run
sleep = [sys.executable, "-c", "import time; time.sleep(1000)", sys.argv[1]]
with ThreadPoolExecutor(int(sys.argv[2])) as pool:
    print(list(pool.map(lambda _: run(sleep), range(5))))
"""


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_jobs_of_threads_end_and_no_other_starts(at_a_time: int, tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    words = [
        sys.executable,
        str(REPO / "scripts/run.py"),
        "jobs",
        mark := str(tmp_path / "mark"),
        str(at_a_time),
    ]
    # the jobs, and their parent
    at_work = lambda: len(commands_of(mark)) == at_a_time + 1  # noqa: E731
    assert ended(words, at_work, PYTHONPATH=str(tmp_path)) == (143, "")
    assert not commands_of(mark)


def test_before_anything_has_started(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text("import sys, time; open(sys.argv[1], 'w'); time.sleep(1000)")
    words = [sys.executable, str(REPO / "scripts/run.py"), "alone", str(tmp_path / "started")]
    status = ended(words, (tmp_path / "started").exists, PYTHONPATH=str(tmp_path))
    assert status == (143, "")


def test_the_exit_status_and_the_lines(tmp_path: Path) -> None:
    from experiments import processes

    lines: list[str] = []
    code = "import sys; print('out'); print('err', file=sys.stderr, flush=True); sys.exit(3)"
    assert processes.run([sys.executable, "-uc", code], lines.append, env=dict(os.environ)) == 3
    assert lines == ["out\n", "err\n"]
