"""Which of torch's kernels attention takes on a GPU."""

from __future__ import annotations

from typing import Any

from xmoe_fairseq_compat.registry import patch, wrap


def leave_cudnn() -> None:
    """For the whole process; does nothing where there is no GPU."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def has_blocks_of_one_length(task: Any) -> bool:
    """Whether its batches are text cut into blocks of --tokens-per-sample, sentences or not."""
    settings = getattr(task, "args", None) or getattr(task, "cfg", None)
    return getattr(settings, "sample_break_mode", "eos") in (None, "none")


@patch("fairseq.models")
def plan_no_attention_by_length(module: Any) -> None:
    """torch 2.11 on an H200, in half precision: cuDNN's attention is preferred, which makes a plan for every
    new shape (119 ms, for a call of 0.3 ms). Batches of sentences have a new one in nearly every update.
    Where text is cut into blocks of one length the choice stays torch's: at length 1,024 it is the fastest.
    """

    @wrap(module, "build_model")
    def build_model(plain: Any, cfg: Any, task: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_blocks_of_one_length(task):
            leave_cudnn()
        return plain(cfg, task, *args, **kwargs)


@patch("fairseq.sequence_generator")
def plan_no_attention_by_step(module: Any) -> None:
    """The same: what is generated has a new length in each step."""

    @wrap(module.SequenceGenerator, "__init__")
    def init(plain: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        leave_cudnn()
        plain(self, *args, **kwargs)
