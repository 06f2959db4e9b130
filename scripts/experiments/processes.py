"""Commands that end with the one that started them: `kill` of train.sh or the grid leaves none behind."""

import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any

TERMINATED = 128 + signal.SIGTERM  # exit status, as a shell's

_running: set["subprocess.Popen[str]"] = set()
_ends = False


def pass_on_termination() -> None:
    """To be called in the main thread, once."""
    signal.signal(signal.SIGTERM, _pass_on)


def _pass_on(*_: object) -> None:
    global _ends
    _ends = True
    for process in list(_running):
        process.terminate()
    if not _running:
        raise SystemExit(TERMINATED)


def run(
    words: Sequence[str], each_line: Callable[[str], None] | None = None, deadline: float = 0, **options: Any
) -> int:
    """The exit status of a command, from any thread.

    Args:
        each_line: gets what it prints, stderr too; None = as the options of subprocess.Popen say.
        deadline: seconds after which it is terminated; 0 = none.

    Raises:
        SystemExit: it was ended because this process is to end.
    """
    if each_line:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    if _ends:
        raise SystemExit(TERMINATED)
    with subprocess.Popen(words, text=True, **options) as process:
        _running.add(process)
        timer = threading.Timer(deadline, process.terminate)
        try:
            if deadline:
                timer.start()
            if _ends:  # meanwhile
                process.terminate()
            if each_line and process.stdout:
                for line in process.stdout:
                    each_line(line)
            process.wait()
        finally:
            timer.cancel()
            process.terminate()  # nothing, unless an exception got here
            _running.discard(process)
    if _ends:
        raise SystemExit(TERMINATED)
    return process.returncode
