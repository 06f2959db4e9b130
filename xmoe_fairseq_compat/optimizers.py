"""What optimizers need."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from xmoe_fairseq_compat.registry import patch, wrap


@patch("fairseq.optim.adam")
def update_in_one_pass(module: Any) -> None:
    """Every torch: on a CPU --optimizer adam reads and writes each parameter and its averages ten times over.

    torch's fused AdamW does the same in one pass, to rounding. Its epsilon is added to a root that is divided
    by the root of the second average's bias, fairseq's before that, so it is divided here. The state is
    fairseq's. Anything but fp32 on a CPU goes fairseq's way, and so does an update with a new parameter.
    """
    import torch

    def fits(parameter: Any, state: dict[str, Any]) -> bool:
        tensors = parameter, parameter.grad, state.get("exp_avg"), state.get("exp_avg_sq")
        return all(
            tensor is not None
            and tensor.device.type == "cpu"
            and tensor.dtype == torch.float32
            and tensor.layout == torch.strided
            and tensor.is_contiguous()
            for tensor in tensors
        )

    def update(group: dict[str, Any], step: int, parameters: list[Any], states: list[dict[str, Any]]) -> None:
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            parameters, [p.grad for p in parameters],
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [torch.tensor(float(step))] * len(parameters),
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
            eps=group["eps"] / math.sqrt(1 - beta2**step), amsgrad=False, maximize=False,
        )  # fmt: skip

    @wrap(module.Adam, "step")
    def step(plain: Any, self: Any, closure: Any = None) -> Any:
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if closure is not None or not all(
            not group.get("amsgrad") and fits(p, self.state.get(p, {})) for group, ps in groups for p in ps
        ):
            return plain(self, closure)
        with torch.no_grad():
            for group, parameters in groups:
                by_step: dict[int, list[Any]] = defaultdict(list)
                for p in parameters:
                    self.state[p]["step"] += 1
                    by_step[self.state[p]["step"]].append(p)
                for count, those in by_step.items():
                    update(group, count, those, [self.state[p] for p in those])
        return None
