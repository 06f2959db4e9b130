"""Compiles the native kernel for the torch that is installed: `python -m xmoe_fairseq.moe.native`.

scripts/setup.sh and setup.py run this file where the package cannot be imported yet, so it needs the standard
library only. The compiled library uses torch's C++ interface and none of Python's: one fits every Python. It
runs on any processor of its kind: the loops are there for several, and which are used is decided when it is
loaded.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
COMMAND = "python -m xmoe_fairseq.moe.native"
SCRATCH = "building-"
# No errno and no traps: nobody reads either, and with them the loops do not become vectors.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG")


class BuildError(Exception):
    """What is missing, in one line."""


def torch_folder() -> Path:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("there is no torch here to build for")
    return Path(spec.origin).parent


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cpp"))


def library_name() -> str:
    """Changes with the sources, with torch, and with the machine: `experts-<torch>-<all of it>.so`."""
    torch_version = torch_folder().joinpath("version.py").read_bytes()
    made_from = [path.read_bytes() for path in (*sources(), *sorted(HERE.glob("*.h")))]
    made_from += [torch_version, repr((FLAGS, platform.machine(), sys.platform)).encode()]
    everything = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]
    return f"experts-{hashlib.sha256(torch_version).hexdigest()[:8]}-{everything}.so"


def is_whole(library: Path) -> bool:
    """Whether its last 4 bytes are the CRC-32 of the others, as `build` leaves it: loading a library that was
    cut short ends the process."""
    content = library.read_bytes() if library.exists() else b""
    return content[-4:] == zlib.crc32(content[:-4]).to_bytes(4, "little")


def build(folder: Path = HERE) -> str:
    """Puts the library into `folder`, unless it is there, whole; one process at a time. What a build that was
    killed has left is removed.

    Returns:
        What was done, in one line.

    Raises:
        BuildError: it cannot be built here.
    """
    path, start = folder / library_name(), time.monotonic()
    try:
        if is_whole(path):
            return "the native kernel is up to date"
        if is_whole(HERE / path.name):  # a wheel is being made
            shutil.copy(HERE / path.name, path)
            return "the native kernel was there already"
        compiler()
        import fcntl  # which is there on Linux

        with open(__file__, "ab") as lock:  # for writing, or a lock on NFS is refused
            fcntl.flock(lock, fcntl.LOCK_EX)
            if is_whole(path):
                return "the native kernel is up to date"
            for left in folder.glob(f"{SCRATCH}*"):
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
                made = compile_library(Path(scratch))
                for old in folder.glob(f"{path.name.rsplit('-', 1)[0]}-*.so"):  # of this torch
                    old.unlink()
                made.write_bytes((content := made.read_bytes()) + zlib.crc32(content).to_bytes(4, "little"))
                made.replace(path)
    except OSError as error:
        advice = "run it as that folder's owner, or install into an environment of your own"
        raise BuildError(f"cannot write to {folder} ({error.strerror}); {advice}") from None
    return f"the native kernel was built in {time.monotonic() - start:.0f} s"


def compiler() -> list[str]:
    """The command, of $CXX, which may have arguments and begin with `ccache`.

    Raises:
        BuildError: there is none, or this is not Linux.
    """
    if sys.platform != "linux":
        raise BuildError(f"the native kernel is for Linux, and this is {sys.platform}")
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler '{command[0]}'; install one (Debian: apt-get install g++)")
    return command


def compile_library(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """The library, which torch has loaded once, in `folder`.

    Args:
        flags: further ones for the compiler.

    Raises:
        BuildError: no compiler, or it failed.
    """
    command, torch = compiler(), torch_folder()
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    compile_one = partial(_compile, [*command, *FLAGS, *flags, *includes], folder)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources()))
    library = folder / "experts.so"
    # Not -fopenmp again: the OpenMP that torch is linked to is the one that must know the threads.
    links = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run([*command, *flags, "-shared", *map(str, objects), *links, "-o", str(library)])
    if not flags:
        _run([sys.executable, "-c", f"import torch; torch.ops.load_library({str(library)!r})"])
    return library


def _compile(command: list[str], folder: Path, source: Path) -> Path:
    made = folder / f"{source.stem}.o"
    _run([*command, "-c", str(source), "-o", str(made)])
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise BuildError(f"{command[0]} failed: {(lines or done.stderr.splitlines() or ['no message'])[0]}")


def note_for_pip(library: Path) -> None:
    """Adds the library to what the package has installed, so that `pip uninstall` takes it too."""
    place = f"xmoe_fairseq/moe/native/{library.name}"
    try:
        installed = metadata.distribution("xmoe_fairseq")
    except metadata.PackageNotFoundError:
        return
    record = next((Path(str(file.locate())) for file in installed.files or () if file.name == "RECORD"), None)
    # An editable install has its library elsewhere.
    if record and Path(str(installed.locate_file(place))).exists() and place not in record.read_text("utf-8"):
        with record.open("a", encoding="utf-8") as text:
            text.write(f"{place},,\n")


def main() -> None:
    try:
        print(build(), flush=True)
        note_for_pip(HERE / library_name())
    except BuildError as error:
        sys.exit(f"the native kernel was not built: {error}")


if __name__ == "__main__":
    main()
