"""What fairseq's checkpoints need: opening one runs no code."""

from __future__ import annotations

import argparse
import collections
import re
import typing
from typing import Any

from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.registry import has, mend, stand_in


@mend("fairseq.checkpoint_utils", when=lambda: has("torch", 2, 6))
def allow_plain_types_in_checkpoints(module: Any) -> None:
    """torch >= 2.6 loads tensors and a few builtins only; fairseq saves these plain types too."""
    import numpy as np
    import omegaconf as oc
    import torch
    from fairseq.distributed.utils import _TensorPlaceholder

    multiarray = (getattr(np, "_core", None) or np.core).multiarray
    numpy_makers = (multiarray._reconstruct, multiarray.scalar)
    types: list[Any] = [argparse.Namespace, np.ndarray, np.dtype]
    types += [type(np.dtype(name)) for name in ("bool", "i4", "i8", "f4", "f8")]
    # by the names that numpy 1 and numpy 2 write
    for core in ("core", "_core"):
        types += [(make, f"numpy.{core}.multiarray.{make.__name__}") for make in numpy_makers]
    # what rank 0 sends to the others when a distributed run resumes
    types += [_TensorPlaceholder, oc.DictConfig, oc.ListConfig, oc.base.ContainerMetadata, oc.base.Metadata]
    types += [oc.nodes.AnyNode, typing.Any, collections.defaultdict, dict, list, int, float, str, bool]
    torch.serialization.add_safe_globals(types)


def load(file: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.load that never runs code, whatever the caller or an environment variable says.

    Raises:
        CheckpointError: the file is damaged, or holds what is not on the list of safe types.
        OSError: there is no such file, or it may not be read.
    """
    import torch

    try:
        return torch.load(file, *args, **{**kwargs, "weights_only": True})
    except (MemoryError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
        problem = "it is damaged or no checkpoint; copy it again or use another"
        if refused:
            problem = (
                f"it holds {refused[1]}, which is not on the list of types that are safe to load; save it"
                " again without, or if you trust it allow the type in a --user-dir with"
                " torch.serialization.add_safe_globals"
            )
        raise CheckpointError(file, problem) from error


def load_checkpoint(file: Any, *args: Any, **kwargs: Any) -> Any:
    """A file that must be a checkpoint. Raises what `load` raises."""
    state = load(file, *args, **kwargs)
    for names in (("model",), ("cfg", "args"), ("optimizer_history", "best_loss")):  # or of old
        if not isinstance(state, dict) or not any(name in state for name in names):
            raise CheckpointError(file, f"it has no entry {names[0]!r}; name a file that fairseq-train saved")
    return state


@mend("fairseq.checkpoint_utils", when=lambda: has("torch", 2, 6))
def say_why_a_checkpoint_is_refused(module: Any) -> None:
    """torch >= 2.6 reports a refused type in a page of advice, and a damaged file without its name."""
    import torch

    module.torch = stand_in(torch, load=load_checkpoint)


@mend("fairseq.checkpoint_utils")
def read_experts_whole(module: Any) -> None:
    """Every torch: fairseq reads a checkpoint from one file; experts may lie in files of their own.

    And it builds the model as the training run had it; here every process that only reads holds all experts.
    """
    plain_load = module.load_checkpoint_to_cpu

    def load_checkpoint_to_cpu(path: Any, *args: Any, **kwargs: Any) -> Any:
        state = plain_load(path, *args, **kwargs)
        model_cfg: Any = (state.get("cfg") or {}).get("model")
        if hasattr(model_cfg, "keys") and "moe_expert_parallel_size" in model_cfg:
            model_cfg["moe_expert_parallel_size"] = 1
        if "expert_shards" not in state:
            return state
        from xmoe_fairseq.parallel.shards import join_shards

        return join_shards(state, path)

    module.load_checkpoint_to_cpu = load_checkpoint_to_cpu
