"""What a layer costs beside its products: whether it is the same twice, its memory, its rate."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import AIM, FLOOR, OURS, parse, subjects, tokens
from benchmarks.timing import forward_backward, in_turn
from gpu_check.budgets import BUDGETS, cost_of
from gpu_check.layers import PRECISIONS, Shape, as_a_gpu, layer_of, tensors_of
from gpu_check.machine import call_of
from gpu_check.outcomes import Case, Check, Failed, Found, Skip
from xmoe_fairseq.moe.experts.products import lacks

# Enough for atomics to race.
RACING = Shape(tokens=2048, model_dim=64, expert_dim=64, experts=16, padding=100)
# Times the peak of the dense products of as many rows, forward and backward. By live tensors on a CPU, where
# sums are not Triton's, it is 3.05; an H200 has 2.38.
MOST_MEMORY = 3.3
LEAST_RATE = 0.12  # of the dense products': an H200 has 0.15 to 0.19


def checks(case: Case) -> Iterator[Check]:
    for name in BUDGETS:
        yield Check(f"cost {name}", partial(within_budget, case.device, name))
    for name in PRECISIONS:
        yield Check(f"cost same bits, {name}", partial(same_bits, case.device, *PRECISIONS[name]))
    yield Check("cost memory", partial(memory, case))
    yield Check("cost rate", partial(rate, case))


def within_budget(device: torch.device, name: str) -> Found:
    """On a card without torch's grouped product the host waits once more, for the rows of each expert."""
    cost, wrong = cost_of(name, device)
    most = BUDGETS[name]
    if "grouped" in name and device.type == "cuda" and lacks(call_of(device, "bf16")):
        most = most._replace(waits=most.waits + 1)
    wrong += [
        f"{what} {took}, at most {limit}"
        for what, took, limit in zip(("waits", "kernels", "in backward", "kept"), cost, most, strict=True)
        if took > limit
    ]
    if wrong:
        raise Failed("; ".join(wrong), cost._asdict())
    said = f"{cost.waits} waits, {cost.forward} and {cost.backward} kernels, {cost.kept} x (R x D) kept"
    return Found(said, cost._asdict())


def same_bits(device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None) -> Found:
    """Two runs, and one under torch.use_deterministic_algorithms, which raises where torch knows no way."""
    torch.manual_seed(1)
    layer = layer_of(RACING).to(device, dtype)
    x_TD, grad_TD = (torch.randn(RACING.tokens, RACING.model_dim, device=device, dtype=dtype) for _ in "xg")
    mask_T = torch.arange(RACING.tokens, device=device) < RACING.padding
    found = []
    for strict in (False, False, True):
        torch.use_deterministic_algorithms(strict)
        layer.zero_grad()
        try:
            with as_a_gpu(device, autocast):
                found.append(tensors_of(layer, x_TD, mask_T, grad_TD))
        finally:
            torch.use_deterministic_algorithms(False)
    other = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    if other:
        raise Failed(f"two runs differ in {', '.join(other)}")
    return Found("two runs are equal bit for bit; deterministic algorithms raise nothing")


def passes(device: torch.device, *flags: str) -> dict[str, tuple[Callable[[], None], list[Tensor]]]:
    """Forward and backward of the benchmark's layer and of its dense products, and what gets gradients."""
    case = parse([*flags, "--device", str(device)])
    made = subjects(case, tokens(case))
    found = {}
    for name in (FLOOR, OURS):
        output, leaves = made[name]()
        found[name] = forward_backward(output, leaves, torch.randn_like(output().detach())), leaves
    return found


def memory(case: Case) -> Found:
    if case.device.type == "cpu":
        raise Skip("is counted by CUDA's allocator; benchmark_layer.sh measures a CPU's")
    dense, ours = (peak(*each) for each in passes(case.device).values())
    numbers = {"dense products, MB": dense / 1e6, "layer, MB": ours / 1e6}
    if not ours <= MOST_MEMORY * dense:
        raise Failed(f"peak is {ours / dense:.2f} of the dense products', at most {MOST_MEMORY}", numbers)
    return Found(f"peak is {ours / dense:.2f} of the dense products'", numbers)


def peak(run: Callable[[], None], leaves: list[Tensor]) -> int:
    """Bytes that a forward and backward pass adds to what is allocated, gradients too."""
    run()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rate(case: Case) -> Found:
    if case.device.type == "cpu":
        raise Skip("says nothing about a GPU; benchmark_layer.sh measures a CPU's")
    return share_of_dense(case.device, LEAST_RATE)


def share_of_dense(device: torch.device, least: float, *flags: str) -> Found:
    runs = {name: run for name, (run, _) in passes(device, *flags).items()}
    timings = in_turn(runs, rounds=5, calls=10)
    share = 1 / timings[OURS].ratio
    said = f"forward and backward at {share:.0%} of the dense products' rate"
    numbers = {name: timing.milliseconds for name, timing in timings.items()}
    if not share >= least:
        raise Failed(f"{said}, at least {least:.0%}", numbers)
    return Found(f"{said} (aim {AIM:.0%})", numbers)
