"""Registers the models and criterions once this package and fairseq are both imported, whichever is first.

Until then nothing imports fairseq: what is plain torch works without it, and beside another version.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import SimpleNamespace
from typing import Any

from xmoe_fairseq._requirements import check_requirements
from xmoe_fairseq_compat.registry import patch

PLAIN_TORCH = ("", "_register", "_requirements", "interop", "moe")  # the first: itself, when it is reloaded


def register(_: Any = None) -> None:
    """Raises RequirementError."""
    check_requirements()
    # fairseq auto-imports models/ but never criterions/, and neither when this package was imported first.
    from xmoe_fairseq import criterions, models  # noqa: F401


class RegisterFirst:
    """On sys.meta_path: the first module that needs fairseq, whichever it is, waits until all is registered.

    Else it would be half imported when it imports fairseq, and models/ with that, and models/ imports it.
    """

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package != "xmoe_fairseq" or rest.partition(".")[0] in PLAIN_TORCH:
            return None
        check_requirements()  # before fairseq is imported, to name what is missing
        sys.meta_path.remove(cls)
        import fairseq  # noqa: F401

        registered = sys.modules.pop(name, None)
        if registered is None:
            return None
        loader: Any = SimpleNamespace(  # it has run: a module may put another in its place
            create_module=lambda spec: None, exec_module=lambda _: sys.modules.update({name: registered})
        )
        return spec_from_loader(name, loader)


if "fairseq" in sys.modules:
    register()
else:
    patch("fairseq")(register)
    sys.meta_path.insert(0, RegisterFirst)
