"""What fairseq needs to run on several ranks, on CPUs too."""

from __future__ import annotations

import os
from typing import Any

from xmoe_fairseq_compat.registry import has, mend, stand_in


@mend("fairseq.models.distributed_fairseq_model")
def torch_ddp(module: Any) -> None:
    """Every torch: pytorch_ddp refuses device_ids on CPU, and its second update waits for unused weights.

    These are the fast path's copies of the encoder's weights. They are frozen only while DDP notes which
    gradients to wait for: the optimizer must go on counting them, as its saved states do.
    """
    plain_ddp = module.DistributedDataParallel
    parts = ("in_proj", "out_proj", "fc1", "fc2")
    copies = [f"{part}_{kind}" for part in parts for kind in ("weight", "bias")]

    def ddp(module: Any, device_ids: Any = None, output_device: Any = None, **kwargs: Any) -> Any:
        from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

        if next(module.parameters()).device.type == "cpu":
            device_ids = output_device = None
        layers = [layer for layer in module.modules() if isinstance(layer, TransformerEncoderLayerBase)]
        found = [getattr(layer, name, None) for layer in layers for name in copies]
        unused = [parameter for parameter in found if parameter is not None and parameter.requires_grad]
        for parameter in unused:
            parameter.requires_grad_(False)
        try:
            return plain_ddp(module, device_ids=device_ids, output_device=output_device, **kwargs)
        finally:
            for parameter in unused:
                parameter.requires_grad_(True)

    module.DistributedDataParallel = ddp


@mend("fairseq.distributed.utils", when=lambda: has("torch", 2))
def restart_among_the_living(module: Any) -> None:
    """torchrun --max-restarts keeps its store: restarted ranks may read the addresses of the dead, and wait
    for them. (pytorch issue 167288 looks alike.) On one node the number of restarts keeps them apart; on
    several nodes may count differently: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun do it."""
    import torch.distributed as dist

    def init_process_group(backend: Any, init_method: Any, world_size: int, rank: int) -> None:
        env = os.environ
        if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
            dist.init_process_group(backend, init_method, world_size=world_size, rank=rank)
            return
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size, is_master=False)
        attempt = dist.PrefixStore(f"restart {env['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=attempt, world_size=world_size, rank=rank)

    module.dist = stand_in(dist, init_process_group=init_process_group)


@mend("fairseq.distributed.utils")
def gather_on_cpu(module: Any) -> None:
    """Every torch: all_gather_list packs its data into CUDA tensors, also for gloo on CPU."""
    import torch.distributed as dist

    plain_gather = module.all_gather_list

    def all_gather_list(data: Any, group: Any = None, max_size: int = 16384) -> Any:
        group = module.get_global_group() if group is None else group
        if dist.get_backend(group) != "gloo":
            return plain_gather(data, group, max_size)
        gathered = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, data, group=group)
        return gathered

    module.all_gather_list = all_gather_list
