"""What fairseq needs to run on several ranks, on CPUs too."""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

from xmoe_fairseq_compat.errors import UserError
from xmoe_fairseq_compat.registry import has, patch, stand_in, wrap
from xmoe_fairseq_compat.settings import configuration

PATIENCE = timedelta(minutes=30)  # torch's own for gloo; a choice for NCCL


@patch("fairseq.models.distributed_fairseq_model")
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


@patch("fairseq.distributed.utils", when=lambda: has("torch", 2))
def restart_among_the_living(module: Any) -> None:
    """torchrun --max-restarts keeps its store: restarted ranks may read the addresses of the dead, and wait
    for them. (pytorch issue 167288 looks alike.) On one node the number of restarts keeps them apart; on
    several nodes may count differently: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun do it."""
    import torch.distributed as dist

    def init_process_group(backend: Any, init_method: Any, world_size: int, rank: int, **how: Any) -> None:
        env = os.environ
        if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
            dist.init_process_group(backend, init_method, world_size=world_size, rank=rank, **how)
            return
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size, is_master=False)
        attempt = dist.PrefixStore(f"restart {env['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=attempt, world_size=world_size, rank=rank, **how)

    module.dist = stand_in(dist, init_process_group=init_process_group)


@patch("fairseq.distributed.utils", when=lambda: has("torch", 2, 3))
def wait_for_a_rank_that_saves(module: Any) -> None:
    """On GPUs ranks wait for one another for 10 minutes, also for the one that saves, and no flag says how
    long; NCCL guesses from a rank's number which GPU it has, and connects at the first use of a group.

    It is half an hour here, or --heartbeat-timeout if that is longer; so in the groups of `new_groups`.
    """

    @wrap(module, "distributed_init")
    def distributed_init(plain: Any, cfg: Any) -> Any:
        import torch

        ranks, dist = configuration(cfg).distributed_training, module.dist
        how: dict[str, Any] = {"timeout": max(PATIENCE, timedelta(seconds=ranks.heartbeat_timeout))}
        new_group = functools.partial(dist.new_group, **how)
        if ranks.distributed_backend == "nccl" and torch.cuda.is_available():  # which is chosen by now
            how["device_id"] = torch.device("cuda", torch.cuda.current_device())
        init_process_group = functools.partial(dist.init_process_group, **how)
        module.dist = stand_in(dist, init_process_group=init_process_group, new_group=new_group)
        return plain(cfg)


@patch("fairseq.distributed.utils")
def gather_on_cpu(module: Any) -> None:
    """Every torch: all_gather_list packs its data into CUDA tensors, also for gloo on CPU, and of a fixed
    size, which what fairseq-validate logs of a few batches exceeds. torch's own has neither limit."""
    import torch.distributed as dist

    def all_gather_list(data: Any, group: Any = None, max_size: int = 0) -> Any:
        from fairseq import utils

        group = module.get_global_group() if group is None else group
        gathered = [None] * dist.get_world_size(group)
        # Tensors would come back on the device of the rank that sent them.
        dist.all_gather_object(gathered, utils.move_to_cpu(data), group=group)
        return gathered

    module.all_gather_list = all_gather_list


class Reading:
    """Batches of one of fairseq's epochs; an error becomes one line with the rank and the files."""

    def __init__(self, batches: Any, epoch: Any) -> None:
        self.batches, self.epoch = batches, epoch

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.batches)
        except StopIteration:
            raise
        except Exception as error:
            found = unreadable(error, self.epoch.dataset)
            getattr(self.epoch, "on_error", lambda _: None)(found)  # a trainer may tell the other ranks
            raise found from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def unreadable(error: Exception, dataset: Any) -> UserError:
    import torch.distributed as dist

    is_one_of_several = dist.is_available() and dist.is_initialized()
    rank = f"rank {dist.get_rank()} of {dist.get_world_size()}: " if is_one_of_several else ""
    reason = (str(error).strip() or repr(error)).splitlines()[-1]  # behind a worker's traceback
    if isinstance(error, UserError):  # which knows more
        return UserError(f"{rank}{reason}")
    files, kind = ", ".join(files_of(dataset)) or "the data", f"{type(error).__name__}: "
    return UserError(f"{rank}cannot read a batch of {files}: {kind}{reason.removeprefix(kind)}")


def files_of(dataset: Any) -> list[str]:
    """The binarised files, without their endings, from which a dataset of datasets is read."""
    from torch.utils.data import Dataset

    found: dict[str, None] = {}
    todo, seen = [dataset], set()
    while todo:
        part = todo.pop(0)
        if isinstance(part, (list, tuple)):
            todo += part
        elif isinstance(part, dict):
            todo += part.values()
        elif isinstance(part, Dataset) and id(part) not in seen:
            seen.add(id(part))
            path = vars(part).get("_path") or vars(part).get("path")
            if isinstance(path, str):
                found[path] = None
            todo += [
                value for value in vars(part).values() if isinstance(value, (Dataset, list, tuple, dict))
            ]
    return list(found)


@patch("fairseq.data.iterators")
def say_who_cannot_read_what(module: Any) -> None:
    """Every torch: where the data cannot be read, no line names the rank or the file; the other ranks see a
    lost connection."""

    def read_by(plain: Any) -> Any:
        def _get_iterator_for_epoch(self: Any, *args: Any, **kwargs: Any) -> Any:
            batches = plain(self, *args, **kwargs)
            if batches is not None:
                batches._itr = Reading(batches._itr, self)
            return batches

        return _get_iterator_for_epoch

    plain_first = module.EpochBatchIterator.first_batch.fget

    def first_batch(self: Any) -> Any:
        try:
            return plain_first(self)
        except Exception as error:
            raise unreadable(error, self.dataset) from error

    module.EpochBatchIterator.first_batch = property(first_batch)
    for kind in (module.EpochBatchIterator, module.GroupedEpochBatchIterator):
        kind._get_iterator_for_epoch = read_by(kind._get_iterator_for_epoch)
