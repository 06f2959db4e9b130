"""What stock fairseq 0.12 needs on today's Python, torch, numpy and hydra.

A line in site-packages (a .pth file) imports this package when Python starts, because fairseq's commands
import fairseq before they read --user-dir. It costs next to nothing then. When fairseq is first looked for,
the patches are read (registry.py says how one is written), and each runs when fairseq imports the one module
that it patches, and only for the versions that have the defect.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # not typing's, whose import would cost more than this whole module
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import Any


def is_active() -> bool:
    """Whether the patches were in place before fairseq was imported."""
    return any(getattr(finder, "patches_fairseq", False) for finder in sys.meta_path)


class Finder:
    """Finds the modules to be patched where the other finders do, and runs their patches with them."""

    patches_fairseq = True

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in ("fairseq", "fairseq_cli"):
            return None
        from xmoe_fairseq_compat import registry

        registry.read_all()
        if not registry.concerns(name):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: Any = find(name, path, target) if find and finder is not cls else None
            if spec is not None and spec.loader is None:
                return spec  # type: ignore[no-any-return]  # a folder without __init__.py runs nothing
            if spec is not None:
                spec.loader.exec_module = registry.patched(name, spec.loader.exec_module)
                return spec  # type: ignore[no-any-return]
        return None


if not is_active() and "fairseq" not in sys.modules:
    sys.meta_path.insert(0, Finder)
