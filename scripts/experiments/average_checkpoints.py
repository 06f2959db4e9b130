"""The mean of several checkpoints' parameters, for score.py.

What fairseq's scripts/average_checkpoints.py does, which pip does not install: floats are averaged in fp32
and kept in the parameter's type; whole numbers, such as hash tables, must agree. The optimizer's state is
left out. Checkpoints are read with weights_only.
"""

from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils

import xmoe_fairseq  # noqa: F401  (what a checkpoint of its models holds)
from xmoe_fairseq.parallel.whole import check_tensors
from xmoe_fairseq.saved_settings import counting
from xmoe_fairseq_compat.errors import CheckpointError
from xmoe_fairseq_compat.files import write_atomically
from xmoe_fairseq_compat.misfits import as_flag, settings_of


def load(path: Path) -> dict[str, Any]:
    """Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(path, "there is no such file")
    state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    check_tensors(state["model"], path)
    return state


def write_average(paths: list[Path], output: Path) -> None:
    mean = average(paths)
    write_atomically(output, lambda file: torch.save(mean, file))


def average(paths: list[Path]) -> dict[str, Any]:
    """Raises CheckpointError if one does not hold what the first holds, or no numbers."""
    state = load(paths[0])
    sums = {
        name: value.float() if value.is_floating_point() else value for name, value in state["model"].items()
    }
    settings = settings_of(state)
    for path in paths[1:]:
        other = load(path)
        for name in counting(settings):  # a threshold, say: the mean would have that of the first
            if (value := settings_of(other).get(name)) != settings[name]:
                was = as_flag(name, settings[name])
                raise CheckpointError(path, f"it has {as_flag(name, value)}, and {paths[0]} has {was}")
        model = other["model"]
        for (has, names), (lacks, others) in permutations(((path, model.keys()), (paths[0], sums.keys()))):
            if names - others:
                raise CheckpointError(lacks, f"it has no {min(names - others)}, which {has} has")
        for name, value in model.items():
            if value.shape != sums[name].shape:
                raise CheckpointError(path, f"{name} has another shape than in {paths[0]}")
            if value.is_floating_point():
                sums[name] = sums[name] + value
            elif not torch.equal(value, sums[name]):
                raise CheckpointError(path, f"{name} differs from that in {paths[0]}, and is no float")
    mean = {
        name: (total / len(paths)).to(state["model"][name].dtype) if total.is_floating_point() else total
        for name, total in sums.items()
    }
    return {key: value for key, value in state.items() if key != "last_optimizer_state"} | {"model": mean}
