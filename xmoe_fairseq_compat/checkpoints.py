"""What fairseq's checkpoints need: opening one runs no code."""

from __future__ import annotations

import argparse
import collections
import re
import typing
from collections.abc import Mapping
from typing import Any

from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.errors import CheckpointError, UserError
from xmoe_fairseq_compat.reading import DAMAGED, check_claims, check_zip
from xmoe_fairseq_compat.registry import has, patch, stand_in, wrap
from xmoe_fairseq_compat.saved_configuration import check_configuration, follow_references


@patch("fairseq.checkpoint_utils", when=lambda: has("torch", 2, 6))
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


def load(file: Any, *args: Any, sums: bool = True, **kwargs: Any) -> Any:
    """torch.load that never runs code, whatever the caller or an environment variable says.

    Args:
        file: a path, or an open file.
        sums: compare the checksums of all tensors, for which the whole file is read (some 2 GB/s). Without,
            a file that is mapped is read only where somebody asks for its tensors.

    Raises:
        CheckpointError: the file is damaged, holds what is not on the list of safe types, or claims to be
            larger than it is.
        OSError: there is no such file, or it may not be read.
    """
    import torch

    size, may_be_mapped = check_zip(file, sums)
    mmap = {"mmap": kwargs["mmap"] and may_be_mapped} if "mmap" in kwargs else {}
    try:
        state = torch.load(file, *args, **{**kwargs, **mmap, "weights_only": True})
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(file, _problem(error)) from error
    check_claims(file, state, size)
    return state


def _problem(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    if refused:
        return (
            f"it holds {refused[1]}, which is not on the list of types that are safe to load; save it"
            " again without, or if you trust it allow the type in a --user-dir with"
            " torch.serialization.add_safe_globals"
        )
    if isinstance(error, MemoryError) or re.search(
        "not enough memory|can't allocate|out of memory", str(error)
    ):
        return "it claims more memory than this machine has"
    return DAMAGED


# What a checkpoint must hold, or fairseq's of old: the entry's name, its types.
ENTRIES: tuple[tuple[tuple[str, ...], tuple[type, ...]], ...] = (
    (("model",), (dict,)),
    (("cfg", "args"), (Mapping, argparse.Namespace)),
    (("optimizer_history", "best_loss"), (list, int, float)),
    (("extra_state", "epoch"), (dict, int)),
)


def load_checkpoint(file: Any, *args: Any, **kwargs: Any) -> Any:
    """A file that must be a checkpoint. Raises what `load` raises."""
    state = load(file, *args, **kwargs)
    for names, types in ENTRIES:
        entries = [state[name] for name in names if name in state] if isinstance(state, dict) else []
        if not entries:
            raise CheckpointError(file, f"it has no entry {names[0]!r}; name a file that fairseq-train saved")
        if not any(isinstance(entry, types) and entry != [] for entry in entries):
            raise CheckpointError(
                file,
                f"its entry {names[0]!r} is {str(entries[0])[:60]!r}; name a file that fairseq-train saved",
            )
    if strange := [name for name in state["model"] if not isinstance(name, str)]:
        raise CheckpointError(file, f"its model holds {strange[0]!r}, where the name of a tensor belongs")
    for name in ("cfg", "args"):
        check_configuration(file, state.get(name))
        follow_references(state.get(name))
    return state


@patch("fairseq.checkpoint_utils", when=lambda: has("torch", 2, 6))
def say_why_a_checkpoint_is_refused(module: Any) -> None:
    """torch >= 2.6 reports a refused type in a page of advice, and a damaged file without its name."""
    import torch

    module.torch = stand_in(torch, load=load_checkpoint)


@patch("fairseq.checkpoint_utils")
def say_what_a_checkpoint_lacks(module: Any) -> None:
    """Every torch: fairseq brings a checkpoint up to date as if it were whole, or ends in a traceback."""

    @wrap(module, "load_checkpoint_to_cpu")
    def load_checkpoint_to_cpu(
        plain: Any, path: Any, arg_overrides: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            return plain(path, arg_overrides, *args, **kwargs)
        except (UserError, OSError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            if isinstance(
                error, KeyError
            ):  # in checkpoints of old fairseq looks names up while it reads them
                reason += " (if that is a model or task, add its --user-dir)"
            what = "it, or what overrides it," if arg_overrides else "it"
            raise CheckpointError(path, f"{what} cannot be read as fairseq's: {reason}") from error


@patch("fairseq.checkpoint_utils")
def let_plugins_complete_a_checkpoint(module: Any) -> None:
    """Every torch: fairseq reads a checkpoint from one file; a plugin's may lie in several."""

    @wrap(module, "load_checkpoint_to_cpu")
    def load_checkpoint_to_cpu(
        plain: Any, path: Any, arg_overrides: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        state = plain(path, arg_overrides, *args, **kwargs)
        for complete in plugins.after_load:
            state = complete(state, path, arg_overrides)
        if any(value is None for value in state["model"].values()):
            for name in state:
                if plugin := plugins.plugin_of(name):  # loaded, it would have taken the entry out
                    problem = f"some of it lies in other files; add --user-dir {plugin.value} to read them"
                    raise CheckpointError(path, problem)
        return state
