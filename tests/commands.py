"""Runs the stock console scripts as a user would, on a corpus small enough for tests."""

import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from forks import BIN, fork, tools

from xmoe_fairseq_compat.errors import UserError

REPO = Path(__file__).parents[1]
PLUGIN = ("--user-dir", str(REPO / "xmoe_fairseq"))
TRAIN = (
    "--cpu", "--optimizer", "adam", "--lr", "1e-3", "--clip-norm", "1.0", "--log-format", "json",
    "--log-interval", "1", "--num-workers", "0", "--seed", "7", "--no-epoch-checkpoints",
)  # fmt: skip
TINY_MT = (
    *PLUGIN, "--task", "translation", "--arch", "xmoe_transformer_tiny", "--encoder-embed-dim", "32",
    "--encoder-ffn-embed-dim", "32", "--moe-num-experts", "8", "--moe-ffn-split", "2", "--batch-size", "8",
    "--criterion", "moe_label_smoothed_cross_entropy", "--label-smoothing", "0.1",
)  # fmt: skip
TINY_LM = (
    *PLUGIN, "--task", "language_modeling", "--arch", "xmoe_transformer_lm_tiny", "--decoder-embed-dim", "32",
    "--decoder-ffn-embed-dim", "32", "--moe-num-experts", "8", "--moe-ffn-split", "2",
    "--tokens-per-sample", "32", "--batch-size", "4", "--criterion", "moe_cross_entropy",
)  # fmt: skip


# scripts/test_settings.sh sets what is read here; each process that a test starts has the same.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
ARITHMETIC = {
    name: os.environ[name]
    for name in ("OMP_NUM_THREADS", "MKL_CBWR", "ATEN_CPU_CAPABILITY")
    if name in os.environ
}
DEADLINE = 1200.0  # seconds for one command; only one that hangs comes near it, on a busy machine too


def run(tool: str, *arguments: object, succeeds: bool = True, stdin: str = "", **env: str) -> str:
    """stdout and stderr together; asserts the exit status. The process is a fork that has imported torch and
    fairseq, and nothing of this package but its patches."""
    return _run_forks(tool, arguments, [env], succeeds, stdin)[0]


def for_shells() -> dict[str, str]:
    """The environment of a shell script or of documented commands: the Python processes that they start are
    forks, too."""
    return {"PATH": f"{tools()}:{BIN}:/usr/bin:/bin", "VENV": str(tools().parent), **ARITHMETIC}


def script(name: str, *arguments: object, succeeds: bool = True, **env: str) -> str:
    """What a shell script of scripts/ printed, stderr too; asserts the exit status."""
    result = subprocess.run(
        ["bash", str(REPO / "scripts" / name), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
        env=for_shells() | env,
    )
    assert (result.returncode == 0) == succeeds, result.stdout[-3000:]
    return result.stdout


def run_as_torchrun(ranks: int, tool: str, *arguments: object, succeeds: bool = True) -> str:
    """As `run`, on ranks that find one another by torchrun's variables; what rank after rank printed."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return "".join(_run_forks(tool, arguments, each, succeeds, ""))


def run_anew(tool: str, *arguments: object) -> str:
    """As `run`, in a new Python process, with all that happens when one starts."""
    result = subprocess.run(
        [str(BIN / tool), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def call(main: Callable[[], None], command: str, *arguments: object) -> tuple[int, str]:
    """Exit status and output of a command whose main is called in this process."""
    text = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [command, *map(str, arguments)]),
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
    ):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), text.getvalue()
        except (Exception, KeyboardInterrupt):
            sys.excepthook(*sys.exc_info())
            return 1, text.getvalue()
    return 0, text.getvalue()


def _run_forks(
    tool: str, arguments: tuple[object, ...], environments: list[dict[str, str]], succeeds: bool, stdin: str
) -> list[str]:
    """A process per environment; what each printed."""
    command = [str(BIN / tool), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        read = Path(folder, "stdin")
        read.write_text(stdin)
        printed = [Path(folder, f"rank{rank}") for rank in range(len(environments))]
        forks = []
        for env, output in zip(environments, printed, strict=True):
            with read.open() as stdin_file, output.open("w") as file:
                files = {0: stdin_file.fileno(), 1: file.fileno(), 2: file.fileno()}
                forks.append(fork(command, os.environ | env, files))
        hung = _hang(forks)
        outputs = [output.read_text() for output in printed]
        for process, output in zip(forks, outputs, strict=True):
            assert (process.exitcode == 0) == succeeds, output[-4000:]
        assert not hung, f"{tool} did not end within {DEADLINE:.0f} s"
    return outputs


def _hang(forks: list[BaseProcess]) -> bool:
    """Whether some had to be killed."""
    end = time.monotonic() + DEADLINE
    try:
        for process in forks:
            process.join(max(0.0, end - time.monotonic()))
        return any(process.is_alive() for process in forks)
    finally:
        for process in forks:
            process.kill()
            process.join()


def logged(output: str, group: str) -> list[dict[str, float]]:
    """The JSON records that fairseq printed for `train`, `valid` or `train_inner`."""
    records = re.findall(rf"\| {group} \| (\{{.*\}})", output)
    return [{key: float(value) for key, value in json.loads(record).items()} for record in records]


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """Binarised (translation, language modelling) data: German is English, word by word in upper case."""
    rng = random.Random(5)
    words = [f"w{i}" for i in range(30)]
    for split, lines in (("train", 96), ("valid", 12), ("test", 12)):
        text = [" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(lines)]
        (folder / f"{split}.en").write_text("\n".join(text) + "\n")
        (folder / f"{split}.de").write_text("\n".join(text).upper() + "\n")
    prefixes = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    common = ("--workers", 1, *prefixes)
    run(
        "fairseq-preprocess",
        "-s",
        "en",
        "-t",
        "de",
        "--joined-dictionary",
        "--destdir",
        folder / "mt",
        *common,
    )
    text_only = [f"--{split}pref={folder / split}.en" for split in ("train", "valid", "test")]
    run("fairseq-preprocess", "--only-source", "--destdir", folder / "lm", "--workers", 1, *text_only)
    return folder / "mt", folder / "lm"


def refusal(main: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The one line with which a tool ends."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    with pytest.raises(UserError) as ended:
        main()
    assert "\n" not in str(ended.value)
    return str(ended.value)


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


def commands_of(word: str) -> list[str]:
    """Of all processes that have this in their command line, and have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text().replace("\0", " ")
        except OSError:  # ended meanwhile
            continue
        if word in command:
            found.append(command)
    return found
