"""When a patch runs: before fairseq is imported, in the order of files, for versions that have the defect."""

import inspect
import os
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import xmoe_fairseq_compat as compat
from xmoe_fairseq_compat import registry

COMPAT = Path(compat.__file__)


def test_start_up_imports_no_library() -> None:
    libraries = {"fairseq", "numpy", "packaging", "torch", "xmoe_fairseq"}
    seen = f"import sys; print([*{libraries} & {{*sys.modules}}])"
    assert subprocess.check_output([sys.executable, "-c", seen], text=True).strip() == "[]"


def test_active_once_however_often_it_is_loaded() -> None:
    assert compat.is_active()
    runpy.run_path(str(COMPAT))
    assert sum(getattr(finder, "patches_fairseq", False) for finder in sys.meta_path) == 1


def test_not_active_where_fairseq_came_first() -> None:
    late = f"""
import runpy, sys, types
sys.modules["fairseq"] = types.ModuleType("fairseq")
print(runpy.run_path({str(COMPAT)!r})["is_active"]())
"""
    # -S: without the start-up line
    assert subprocess.check_output([sys.executable, "-S", "-c", late], text=True).strip() == "False"


@pytest.mark.parametrize("version", ["0.11.1", "0.13.0", "1.0.0"])
def test_another_fairseq_is_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.Finder.find_spec("fairseq") is not None
    monkeypatch.setattr(registry, "is_their_fairseq", registry.is_their_fairseq.__wrapped__)
    monkeypatch.setattr(metadata, "version", lambda package: version)
    assert compat.Finder.find_spec("fairseq") is None


def test_patches_of_a_module_run_in_the_order_of_their_files() -> None:
    """Of one function each wraps the one before, so this says which is the outer one."""
    first = """
import xmoe_fairseq_compat.usage, xmoe_fairseq_compat.scoring
from xmoe_fairseq_compat import registry
registry.read_all()
files = {name: [patch.__module__ for _, patch in patches] for name, patches in registry.after.items()}
assert all(found == sorted(found) for found in files.values()), files
print(len(set(files["fairseq_cli.train"])) > 1)
"""
    command, env = (
        [sys.executable, "-S", "-c", first],
        {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert subprocess.check_output(command, text=True, env=env).strip() == "True"


def test_versions_that_have_no_defect_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(registry, "after", {"m": [(lambda: False, ran.append), (lambda: True, ran.append)]})
    module = SimpleNamespace()
    registry.patched("m", lambda module: None)(module)
    assert ran == [module]


def test_a_function_is_put_around_another() -> None:
    """wrap; it is found by the other's name, and shows its own arguments."""

    class Kind:
        def add(self, x: int) -> int:
            return x + 1

        @classmethod
        def make(cls, x: int) -> tuple[type, int]:
            return cls, x

    module = SimpleNamespace(Kind=Kind, main=test_a_function_is_put_around_another)

    @registry.wrap(Kind, "add")
    def add(plain: Any, self: Any, x: int, times: int = 10) -> int:
        return plain(self, x) * times

    @registry.wrap(Kind, "make")
    def make(plain: Any, cls: Any, x: int) -> Any:
        return plain(cls, -x)

    @registry.wrap(module, "main")
    def other(plain: Any) -> Any:
        return plain

    assert (Kind().add(1), Kind().add(1, times=3)) == (20, 6)
    assert inspect.getfullargspec(Kind().add).args == ["self", "x", "times"]
    assert Kind.make(5) == (Kind, -5) == Kind().make(5)
    assert module.main() is test_a_function_is_put_around_another
    assert module.main.__qualname__ == "test_a_function_is_put_around_another"
