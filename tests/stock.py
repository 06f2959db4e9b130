"""Flags for fairseq's own models, tiny and hardly trained."""

from collections.abc import Callable
from pathlib import Path

TINY = (
    "--cpu", "--optimizer", "adam", "--lr", "0.01", "--max-tokens", "200", "--no-epoch-checkpoints",
    "--log-format", "simple", "--num-workers", "0", "--seed", "3", "--max-update", "4",
    "--disable-validation", "--decoder-layers", "1", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim",
    "32", "--decoder-attention-heads", "2",
)  # fmt: skip
TRANSLATION = (
    *TINY, "--arch", "transformer", "--criterion", "label_smoothed_cross_entropy", "--encoder-layers", "1",
    "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "32", "--encoder-attention-heads", "2",
)  # fmt: skip
LANGUAGE = (
    *TINY, "--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "32",
)  # fmt: skip
# Of xmoe-convert, which is to look at little text.
SMALL = ("--calibration-tokens", "300", "--valid-tokens", "60", "--max-tokens", "100")
Stock = Callable[..., tuple[Path, Path]]  # the fixture `stock`: a checkpoint, and its data
