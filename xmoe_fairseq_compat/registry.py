"""Which patches there are: each for one module of fairseq, and only for the versions that have the defect."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from packaging.version import Version

When = Callable[[], bool]
Patch = Callable[[Any], None]  # takes the module
PatchAround = Callable[[Any], Iterator[None]]

EVERY = "*"  # in the place of a name: every module of fairseq

# To run after a module, or around it (what is before a patch's `yield` runs before the module).
after: dict[str, list[tuple[When, Patch]]] = {}
around: dict[str, list[tuple[When, PatchAround]]] = {}


def has(package: str, *version: int) -> bool:
    """Whether this version of a package, or a later one, is installed (2.6.0a0 is 2.6)."""
    try:
        return Version(metadata.version(package)).release >= version
    except metadata.PackageNotFoundError:
        return False


def patch(*modules: str, when: When = lambda: True) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        for module in modules:
            after.setdefault(module, []).append((when, patch))
        return patch

    return register


def patch_around(module: str, when: When = lambda: True) -> Callable[[PatchAround], PatchAround]:
    def register(patch: PatchAround) -> PatchAround:
        around.setdefault(module, []).append((when, patch))
        return patch

    return register


def wrap(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put a function around one of a module or class, which it gets first: `def save(plain, path)`."""

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        plain = getattr(owner, name)
        is_classmethod = isinstance(owner, type) and inspect.ismethod(plain)
        plain = plain.__func__ if is_classmethod else plain

        @functools.wraps(plain)  # with its name: ranks that are spawned find a command's main by that
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(plain, *args, **kwargs)

        # fairseq looks whether a function takes an argument of a certain name
        own = inspect.signature(function)
        wrapped.__signature__ = own.replace(parameters=[*own.parameters.values()][1:])  # type: ignore[attr-defined]
        setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)
        return function

    return put


@functools.cache
def read_all() -> None:
    """Import every file of this package: each registers its patches.

    Of several for one module those of the file whose name comes later are the outer ones, whichever file a
    program, or another file, has imported first.
    """
    package = __name__.rpartition(".")[0]
    for file in sorted(file.name for file in pkgutil.iter_modules(sys.modules[package].__path__)):
        importlib.import_module(f"{package}.{file}")
    registered: list[list[tuple[When, Any]]] = [*after.values(), *around.values()]
    for patches in registered:
        patches.sort(key=lambda entry: str(entry[1].__module__))


@functools.cache
def is_their_fairseq() -> bool:
    """Whether the fairseq that is installed is the one that the patches are for."""
    return has("fairseq", 0, 12) and not has("fairseq", 0, 13)


def concerns(name: str) -> bool:
    """Whether a module of fairseq has patches."""
    names = {name, EVERY}
    return not (names.isdisjoint(after) and names.isdisjoint(around)) and is_their_fairseq()


def patched(name: str, exec_module: Callable[[Any], None]) -> Callable[[Any], None]:
    """What runs a module, with its patches."""

    def exec_patched_module(module: Any) -> None:
        with contextlib.ExitStack() as stack:
            for when, patch_around in around.get(EVERY, []) + around.get(name, []):
                if when():
                    stack.enter_context(contextlib.contextmanager(patch_around)(module))
            exec_module(module)
        for when, patch in after.get(EVERY, []) + after.get(name, []):
            if when():
                patch(module)

    return exec_patched_module


def stand_in(library: Any, **replaced: Any) -> Any:
    """A stand-in for a library within one of fairseq's modules: the same but for the names given."""
    module = type(sys)(library.__name__)
    module.__dict__.update(replaced, __getattr__=lambda name: getattr(library, name))
    return module


@contextlib.contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """Other things under these names of a module, until the end of the block."""
    plain = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(plain)
