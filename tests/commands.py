"""Runs the stock console scripts as a user would, on a corpus small enough for tests."""

import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
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


def run(tool: str, *arguments: object, succeeds: bool = True, stdin: str | None = None, **env: str) -> str:
    """stdout and stderr together; asserts the exit status."""
    result = subprocess.run(
        [str(BIN / tool), *map(str, arguments)],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )
    assert (result.returncode == 0) == succeeds, result.stdout[-4000:]
    return result.stdout


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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
