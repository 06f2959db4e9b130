"""Flags for fairseq's own models, tiny and hardly trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
# The model of the fixture stock("lm"), as it is typed.
LM = ("--task", "language_modeling", "--tokens-per-sample", "16", "--decoder-layers", "2",
      "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "64", "--decoder-attention-heads", "2",
      "--decoder-output-dim", "16", "--decoder-input-dim", "16", "--dropout", "0", "--batch-size", "4",
      "--criterion", "cross_entropy", "--disable-validation")  # fmt: skip
# Of xmoe-convert, which is to look at little text.
SMALL = ("--calibration-tokens", "300", "--valid-tokens", "60", "--max-tokens", "100")
Stock = Callable[..., tuple[Path, Path]]  # the fixture `stock`: a checkpoint, and its data


def outputs(model: Any, sample: dict[str, Any], pad: int) -> torch.Tensor:
    with torch.no_grad():
        return model(**sample["net_input"])[0][sample["target"].ne(pad)]


def one_by_one(model: Any, sample: dict[str, Any], pad: int) -> torch.Tensor:
    """As the generator runs the decoder: a token at a time, with what it keeps of the earlier ones."""
    inputs, state, steps = sample["net_input"], {}, []
    given = inputs.get("prev_output_tokens", inputs["src_tokens"])
    with torch.no_grad():
        source = {}
        if "prev_output_tokens" in inputs:
            source["encoder_out"] = model.encoder(inputs["src_tokens"], inputs["src_lengths"])
        for length in range(1, given.size(1) + 1):
            steps.append(model.decoder(given[:, :length], incremental_state=state, **source)[0])
    return torch.cat(steps, dim=1)[sample["target"].ne(pad)]
