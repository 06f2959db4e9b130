"""The card and the versions, and which way the experts go in each precision."""

import platform
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu_check.layers import PRECISIONS
from gpu_check.outcomes import Case, Check, Failed, Found
from xmoe_fairseq.moe.experts import Call, ExpertRows, Stacks
from xmoe_fairseq.moe.experts.kernels import _KERNELS, choose_kernel
from xmoe_fairseq.moe.experts.products import lacks

WAYS: dict[str, dict[str, Any]] = {
    **{name: {"precision": name} for name in PRECISIONS},
    "bf16 with dropout": {"precision": "bf16", "dropout": 0.1},
    "bf16, odd widths": {"precision": "bf16", "model_dim": 33},
    "bf16, 1100 experts": {"precision": "bf16", "experts": 1100},
}


def checks(case: Case) -> Iterator[Check]:
    yield Check("machine card and versions", partial(versions, case.device))
    for name, what in WAYS.items():
        yield Check(f"kernel {name}", partial(way, case.device, **what))


def facts(device: torch.device) -> dict[str, Any]:
    """For a bug report."""
    found: dict[str, Any] = {
        "python": platform.python_version(), "system": platform.platform(), "torch": torch.__version__,
        **{name: installed(name) for name in ("fairseq", "triton", "numpy", "xmoe-fairseq")},
    }  # fmt: skip
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "card": f"{torch.cuda.device_count()} x {about.name}",
            "capability": f"{about.major}.{about.minor}", "memory, GB": round(about.total_memory / 1e9, 1),
            "multiprocessors": about.multi_processor_count, "CUDA": torch.version.cuda,
            "NCCL": torch.distributed.is_nccl_available() and torch.cuda.nccl.version(),
            "cuDNN": torch.backends.cudnn.version(),
        }  # fmt: skip
    return found


def versions(device: torch.device) -> Found:
    found = facts(device)
    ones = torch.ones(64, 64, device=device)
    if not torch.equal(ones @ ones, 64 * ones):
        raise Failed("a product of ones is wrong", found)
    return Found(", ".join(f"{name} {value}" for name, value in found.items()), found)


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def call_of(
    device: torch.device, precision: str, dropout: float = 0.0, model_dim: int = 64, experts: int = 8
) -> Call:
    """Of one row of zeros."""
    dtype, _ = PRECISIONS[precision]
    shapes = (experts, 32, model_dim), (experts, 32), (experts, model_dim, 32), (experts, model_dim)
    stacks = Stacks(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))
    counts_E = torch.zeros(experts, dtype=torch.long, device=device)
    rows = ExpertRows(counts_E[:1], None, counts_E.index_fill(0, counts_E[:1], 1))
    x_SD = torch.zeros(1, model_dim, dtype=dtype, device=device)
    return Call(x_SD, rows, stacks, torch.relu, dropout)


def way(device: torch.device, **what: Any) -> Found:
    """On a GPU always the grouped one; who was preferred and cannot, or what its products lack, is named."""
    call, (_, autocast) = call_of(device, **what), PRECISIONS[what["precision"]]
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        chosen = choose_kernel(call)
        refused = {k.name: k.refuses(call) for k in _KERNELS.values() if k.preference > chosen.preference}
        missing = lacks(call) if chosen.name == "grouped" else ""
    reasons = [f"{name} needs {why}" for name, why in refused.items() if why]
    if missing:
        reasons.append(f"an expert at a time: torch's grouped product needs {missing}")
    text = "; ".join([chosen.name, *reasons])
    if device.type == "cuda" and chosen.name != "grouped":
        raise Failed(f"must be grouped on a GPU, is {text}")
    return Found(text, {"kernel": chosen.name, "lacks": missing, "refused": refused})
