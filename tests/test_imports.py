"""No file imports itself by way of others, and each layer imports those below it only."""

from pathlib import Path

import pytest
from commands import REPO
from imports import Imports, circles, imports, names_in, outside

FOLDERS = ("xmoe_fairseq", "xmoe_fairseq_compat", "scripts", "data-prep")


@pytest.fixture(scope="module")
def graph() -> Imports:
    return imports(REPO, FOLDERS)


def test_there_are_no_circles(graph: Imports) -> None:
    assert [" -> ".join(way) for way in circles(graph)] == []


def test_the_patches_know_no_plugin(graph: Imports) -> None:
    assert outside(graph, "xmoe_fairseq_compat") == []


def test_the_core_knows_neither_the_plugin_nor_fairseq(graph: Imports) -> None:
    assert outside(graph, "xmoe_fairseq/moe") == []
    sources = {file: file.read_text() for file in (REPO / "xmoe_fairseq/moe").rglob("*.py")}
    fairseq = ("fairseq", "fairseq_cli", "hydra", "omegaconf")
    found = {(file.name, name) for file, source in sources.items() for name, _ in names_in(source)}
    assert not [each for each in found if each[1].partition(".")[0] in fairseq]


def made(root: Path, **sources: str) -> Imports:
    """Of a package `p`; two underscores within a name stand for a folder."""
    for name, source in {"__init__": "", **sources}.items():
        file = root / "p" / f"{name if name.startswith('_') else name.replace('__', '/', 1)}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return imports(root, ["p"])


LAZY = "def f():\n    from p.a import g\n"


@pytest.mark.parametrize(
    "back",
    [
        "import p.a",
        "from p import a",
        "from . import a",
        "from .a import g",
        LAZY,
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import g",
        "import importlib\nimportlib.import_module('p.a')",
        "__import__('p.a')",
    ],
)
def test_a_circle_is_found_and_named(back: str, tmp_path: Path) -> None:
    graph = made(tmp_path, a="import p.b", b="import p.c", c=back, d="import p.a")
    assert circles(graph) == [["p/a.py", "p/b.py", "p/c.py", "p/a.py"]]
    assert circles(made(tmp_path, c="import os, a")) == [], "its neighbour in a package is p.a, not a"


def test_packages_that_hand_on_their_modules(tmp_path: Path) -> None:
    """Siblings that import one another directly are no circle; to ask the package for a name is one."""
    package = {"q____init__": "from p.q.x import f\nfrom p.q.y import g", "q__y": ""}
    assert circles(made(tmp_path, **package, q__x="from p.q.y import g", a="from p.q import f")) == []
    graph = made(tmp_path, **package, q__x="from p.q import g")
    assert circles(graph) == [["p/q/__init__.py", "p/q/x.py", "p/q/__init__.py"]]
    graph = made(tmp_path, **package, q__x="import p.a", a="import p.q.y")
    assert circles(graph) == [["p/a.py", "p/q/__init__.py", "p/q/x.py", "p/a.py"]], "q runs before q.y"


def test_scripts_find_what_lies_beside_them(tmp_path: Path) -> None:
    for name, source in (("a", "import b, p"), ("b", LAZY.replace("p.a", "a"))):
        (tmp_path / f"{name}.py").write_text(source)
    made(tmp_path, a="import a")
    assert circles(imports(tmp_path, ["."])) == [["a.py", "b.py", "a.py"]]


def test_what_lies_outside_is_named(tmp_path: Path) -> None:
    graph = made(tmp_path, q____init__="", q__x=LAZY, a="")
    assert outside(graph, "p/q") == ["p/q/x.py imports p/a.py"]
    assert outside(graph, "p/q", "p") == []
