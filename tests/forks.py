"""Python processes that start at once: forks of one that has imported torch and fairseq.

Importing them takes 4 s of a core, what optimizers import at their first step 3 s more. `fork` runs one
command; `tools` is a folder like the virtual environment's bin/, for shell scripts: forks do what its tools
are to do. Variables that are read when fairseq is imported (sacreBLEU's folder) make it a process of its own.
"""

import fcntl
import gc
import io
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import socketserver
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
ADDED = [str(HERE), str(HERE.parent / "scripts")]  # by conftest.py to Python's path
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "torch", "torch._dynamo", "fairseq"])

CLIENT = f"""#!{sys.executable} -SE
import json, os, signal, socket, sys

name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name != "python":
    words.insert(0, f"{BIN}/{{name}}")
elif not words or (words[0][0] == "-" and words[0] not in ("-c", "-m")) or "SACREBLEU" in os.environ:
    os.execv("{sys.executable}", ["{sys.executable}", *words])
files = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{{name}}")]
files = [*filter(os.get_inheritable, files)]
server = socket.socket(socket.AF_UNIX)
server.connect(os.path.join(os.path.dirname(os.path.dirname(sys.argv[0])), "server"))
socket.send_fds(server, [b"-"], files)
lines = server.makefile("rw")
about = dict(words=words, environment=dict(os.environ), folder=os.getcwd(), executable=sys.argv[0])
print(json.dumps(about | dict(files=files)), file=lines, flush=True)
fork = int(lines.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(fork, number))
status = int(lines.readline())
if status < 0:
    if -status in (signal.SIGINT, signal.SIGTERM):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


class _Descriptor:
    """Of an open file, that goes along to a fork."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> object:
        return reduction.DupFd(self.number)

    def __setstate__(self, passed: "reduction.DupFd") -> None:
        self.number = passed.detach()


def fork(
    words: Sequence[str], environment: dict[str, str], files: dict[int, int], folder: str = "",
    executable: str = sys.executable,
) -> BaseProcess:  # fmt: skip
    """Has started what `python WORDS` does.

    Args:
        files: its descriptors (0 to 2 are stdin, stdout and stderr), and which of this process they are.
        folder: where it works; "" = where this process does.
        executable: what it takes for the path of its Python.
    """
    folder = folder or os.getcwd()
    descriptors = {number: _Descriptor(here) for number, here in files.items()}
    process = FORKS.Process(target=_become, args=(words, environment, descriptors, folder, executable))
    process.start()
    return process


def _become(
    words: list[str], environment: dict[str, str], files: dict[int, _Descriptor], folder: str, executable: str
) -> None:
    import torch

    received = {number: fcntl.fcntl(file.number, fcntl.F_DUPFD, 100) for number, file in files.items()}
    for number, file in received.items():
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0)  # multiprocessing closed it
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what both streams print stays in order in one file
    gc.freeze()  # or a collection would touch, and so copy, all that the parent has imported
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    multiprocessing.set_start_method(None, force=True)  # Python's default, where it was "forkserver"
    sys.path[:] = [path for path in sys.path if path not in ADDED]  # which a command must do without
    sys.executable = executable
    os.chdir(folder)
    try:
        _python(words)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _python(words: list[str]) -> None:
    first = str(Path(words[0]).absolute().parent)
    if words[0] in ("-c", "-m"):
        first = "" if words[0] == "-c" else os.getcwd()
    further = os.environ.get("PYTHONPATH", "").split(":")
    sys.path[:0] = [first, *filter(None, further)]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(words[1], main.__dict__)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class _Request(socketserver.BaseRequestHandler):
    """Of one client: a fork with its files, whose number and exit status it is told."""

    request: socket.socket

    def handle(self) -> None:
        _, received, _, _ = socket.recv_fds(self.request, 1, 100)
        with self.request.makefile("rw") as lines:
            about = json.loads(lines.readline())
            about["files"] = dict(zip(about["files"], received, strict=True))
            process = fork(**about)
            for file in received:
                os.close(file)
            print(process.pid, file=lines, flush=True)
            process.join()
            print(process.exitcode, file=lines, flush=True)


@cache
def tools() -> Path:
    """bin/ of a folder that stands in for the virtual environment, while this process lasts."""
    folder = Path(tempfile.mkdtemp(prefix="tools"))
    multiprocessing.util.Finalize(None, shutil.rmtree, [folder], {"ignore_errors": True}, exitpriority=1)
    server = socketserver.ThreadingUnixStreamServer(str(folder / "server"), _Request)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "bin").mkdir()
    for name in (
        "python",
        *(path.name for path in BIN.iterdir() if path.name.startswith(("fairseq-", "xmoe-"))),
    ):
        (folder / "bin" / name).write_text(CLIENT)
        (folder / "bin" / name).chmod(0o755)
    return folder / "bin"
