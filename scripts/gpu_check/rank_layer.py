"""One of two ranks that share out a layer's experts, against the whole layer on all tokens. For torchrun."""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from gpu_check.layers import LIMITS, Shape, as_a_gpu, decided, error, tensors_of
from xmoe_fairseq.moe import MoELayer

COUNTS = {"both with tokens": (70, 40), "one without": (70, 0)}  # tokens of each rank


def compare(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    rank, shape = dist.get_rank(), Shape(tokens=sum(counts))
    whole, x_TD = decided(shape, dtype, dtype)
    sizes = shape.model_dim, shape.expert_dim, shape.experts
    spread = MoELayer(*sizes, whole.router, expert_parallel_group=dist.group.WORLD).to(dtype)
    spread.load_state_dict(whole.state_dict())
    grad_TD = torch.randn(x_TD.shape)  # of one seed
    x_TD, grad_TD = x_TD.to(device), grad_TD.to(device)
    expected = tensors_of(whole.to(device), x_TD, None, grad_TD, balance=0)
    whole.zero_grad()  # they have one router
    tokens = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    got = tensors_of(spread.to(device), x_TD[tokens], None, grad_TD[tokens], balance=0)
    if not torch.equal(got["choice"], expected["choice"][tokens]):
        raise AssertionError(f"rank {rank} chose other experts than one process")
    summed = got["gradient of router.weight"].to(device)
    dist.all_reduce(summed)
    got["gradient of router.weight"] = summed.cpu()
    first = spread.experts.first
    experts = slice(first, first + spread.experts.fc1_weight.size(0))
    for name in expected:
        if name in ("output", "choice", "gradient of x"):
            expected[name] = expected[name][tokens]
        elif "experts" in name:
            expected[name] = expected[name][experts]
    return {name: error(got[name], expected[name]) for name in expected if name != "choice"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    is_gpu, timeout = device.type == "cuda", timedelta(minutes=2)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo", timeout=timeout, device_id=device if is_gpu else None
    )
    worst = {}
    for name, counts in COUNTS.items():
        for dtype in (torch.float32, torch.bfloat16):
            with as_a_gpu(device, None):
                found = compare(counts, dtype, device)
            key = max(found, key=lambda key: found[key])  # noqa: B023
            if not found[key] <= 2 * LIMITS[dtype]:  # both are rounded
                raise AssertionError(f"{name}, {dtype}: {key} is off by {found[key]:.1e} of its norm")
            worst[f"{name}, {dtype}"] = found[key]
    if dist.get_rank() == 0:
        print("rank 0: " + ", ".join(f"{name} {value:.0e}" for name, value in worst.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
