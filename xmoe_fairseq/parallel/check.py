"""What cannot be combined with experts that are spread over the ranks, and what to do instead."""

import logging
from typing import Any

from torch import nn

from xmoe_fairseq.config import read_field
from xmoe_fairseq.parallel.groups import expert_names
from xmoe_fairseq_compat.errors import FlagError, flag

logger = logging.getLogger(__name__)


def check_training(cfg: Any, model: nn.Module) -> None:
    """Raises FlagError: one line that names the flag and what to use instead.

    Args:
        cfg: fairseq's whole configuration.
    """

    def refuse(what: str, instead: str) -> None:
        raise FlagError(f"{what} cannot be combined with --moe-expert-parallel-size: {instead}")

    common, distributed = cfg.common, cfg.distributed_training
    if common.fp16 and not (common.fp16_no_flatten_grads or common.memory_efficient_fp16):
        refuse("--fp16 with flat gradients", "add --fp16-no-flatten-grads")
    if common.amp:  # its scaler skips an update on the one rank whose experts overflowed
        refuse("--amp", "use --bf16, or --fp16 --fp16-no-flatten-grads")
    if str(distributed.zero_sharding) != "none":
        refuse(f"--zero-sharding {distributed.zero_sharding}", "leave it out")
    switches = {"use_bmuf": cfg.optimization, "tpu": common, "pipeline_model_parallel": distributed}
    for name, group in {**switches, "ema_fp32": cfg.ema}.items():
        if read_field(group, name, False):
            refuse(flag(name), "leave it out")
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if read_field(cfg.model, name, 0.0):  # ranks would leave out different layers, and wait for ever
            refuse(flag(name), "it must be 0")
    in_decoder = any(name.startswith("decoder.") for name in expert_names(model))
    if in_decoder and read_field(cfg.task, "eval_bleu", False):  # ranks decode different numbers of steps
        refuse("--eval-bleu", "add --no-moe-decoder, or score checkpoints with fairseq-generate")
    is_overlapping = str(distributed.ddp_backend) in ("pytorch_ddp", "c10d")
    # torch's new_group: what one communicator has in flight must end before another is used
    if is_overlapping and distributed.distributed_backend == "nccl" and distributed.distributed_rank == 0:
        logger.warning(
            f"--ddp-backend {distributed.ddp_backend} reduces gradients while experts exchange rows: of two"
            " NCCL communicators that are busy at once each may wait for the other; use --ddp-backend"
            " legacy_ddp, which reduces after the backward pass"
        )


def check_optimizer(optimizer: Any, cfg: Any) -> None:
    """Raises FlagError if an update of one expert would depend on the other experts of its stack."""
    name = read_field(cfg, "_name", type(optimizer).__name__)
    if name == "composite" or not optimizer.supports_flat_params:
        raise FlagError(
            f"--optimizer {name} cannot be combined with --moe-expert-parallel-size: "
            "use one that updates every weight by itself (adam, sgd, nag, adamax, adadelta)"
        )
