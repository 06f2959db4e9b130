"""A model built by fairseq as a command would build it, on torch's meta device, and one update of it counted.

Nothing is computed and no memory is used: tensors there have shapes alone. What a host would read is taken
to be 0 (no padding), and instead of a choice, which depends on numbers, each token takes k experts.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fairseq.optim import build_optimizer
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from experiments.stand_ins import aten, without_numbers
from xmoe_fairseq.moe import MoELayer, moe_layers
from xmoe_fairseq.moe.dispatch.local import LocalDispatcher

META = torch.device("meta")
EXPERTS = "aten.baddbmm"  # see `multiply`


@dataclass(frozen=True)
class Counted:
    """Of one rank."""

    parameters: Counter[str]
    flops: Counter[str]  # of a forward pass, by operation: EXPERTS are the experts' products
    states: int  # bytes of weights, gradients and optimizer
    kept: int  # bytes beside them when the forward pass has ended
    peak: int  # bytes beside them, at most


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made inside the `with` block and are still there, and at most were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").numpy().item()
        made = op(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def ranks(number: int) -> Iterator[None]:
    """As the first of so many, which are not there."""
    hook = sys.excepthook  # torch puts "[rank0]:" before what it prints, and leaves it so
    if number > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        if number > 1:
            dist.destroy_process_group()
        sys.excepthook = hook


def build(cfg: Any, task: Any) -> tuple[nn.Module, nn.Module]:
    """Model and criterion, in the precision in which they are trained."""
    with META:
        model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(META)
        if isinstance(module, MoELayer):
            module.dispatcher = LocalDispatcher()  # on average as many rows arrive as leave
    if dtype := half(cfg.common):
        model, criterion = model.to(dtype), criterion.to(dtype)
    return model.train(), criterion.train()


def half(common: Any) -> torch.dtype | None:
    if common.bf16 or common.memory_efficient_bf16:
        return torch.bfloat16
    return torch.float16 if common.fp16 or common.memory_efficient_fp16 else None


def optimizer_of(cfg: Any, parameters: list[nn.Parameter]) -> Any:
    """As fairseq's trainer makes it."""
    if half(cfg.common) is None:
        return build_optimizer(cfg.optimizer, parameters)
    efficient = cfg.common.memory_efficient_bf16 or cfg.common.memory_efficient_fp16
    kind = MemoryEfficientFP16Optimizer if efficient else FP16Optimizer
    return kind.build_optimizer(cfg, parameters)


def by_part(model: nn.Module) -> Counter[str]:
    """Parameters, each tensor once."""
    found: Counter[str] = Counter()
    experts = {id(p) for layer in moe_layers(model) for p in layer.expert_parameters()}
    for name, parameter in model.named_parameters():
        found["experts" if id(parameter) in experts else part_of(name)] += parameter.numel()
    return found


def part_of(name: str) -> str:
    *path, module, last = name.split(".")
    if last.startswith(("in_proj_", "out_proj_", "fc1_", "fc2_")):
        return "unused copies"
    for part, names in {
        "routers": ("router.", ".gate."), "beside experts": (".moe.",), "norms": ("norm",),
        "embeddings": ("embed_", "output_projection", "project_"), "attention": ("_attn.",),
    }.items():  # fmt: skip
        if any(each in name for each in names):
            return part
    return "dense FFNs"


def batch(task: str, sentences: int, length: int) -> dict[str, Any]:
    """A batch as the task's criterion takes it, without padding."""
    tokens = torch.zeros(sentences, length, dtype=torch.long, device=META)
    inputs = {"src_tokens": tokens, "src_lengths": tokens[:, 0]}
    if task == "wmt":
        inputs["prev_output_tokens"] = tokens.clone()
    count = sentences * length
    return {"net_input": inputs, "target": tokens.clone(), "ntokens": count, "nsentences": sentences}


def count(cfg: Any, task: Any, sample: dict[str, Any], per_token: float) -> Counted:
    """One update."""
    counter = FlopCounterMode(display=False)
    with without_numbers(per_token), Live() as live:
        model, criterion = build(cfg, task)
        optimizer = optimizer_of(cfg, [p for p in model.parameters() if p.requires_grad])
        live.peak, before = live.now, live.now
        with counter:
            loss = criterion(model, sample)[0]
        kept = live.now - before
        optimizer.backward(loss)
        del loss
        peak = live.peak - before
        optimizer.step()
        states = live.now
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    return Counted(by_part(model), Counter(flops), states, kept, peak)
