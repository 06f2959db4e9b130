"""docs/fairseq_patches.md against the code: a row for every patch, and the test it names exists."""

import re
from pathlib import Path

import pytest

from xmoe_fairseq_compat import registry

REPO = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)` \|.*\| `([^`]+)` \|$", re.M)


def rows() -> list[tuple[str, str]]:
    return ROW.findall((REPO / "docs/fairseq_patches.md").read_text())


def test_each_patch_has_one_row() -> None:
    registry.read_all()
    patches = [
        patch for found in (registry.after, registry.around) for each in found.values() for patch in each
    ]
    assert sorted({patch.__name__ for _, patch in patches}) == sorted(name for name, _ in rows())


@pytest.mark.parametrize(("patch", "test"), rows())
def test_the_test_of_a_patch_exists(patch: str, test: str) -> None:
    if "/" in test:
        assert (REPO / test).is_file()
    else:
        assert any(f"def {test}(" in file.read_text() for file in (REPO / "tests/compat").glob("test_*.py"))
