"""What README.md and docs/ name is there: files, headings, flags."""

import re
from pathlib import Path

import fairseq
import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(
    r"(?<![\w/.$}-])((?:scripts|data-prep|docs|examples|tests|xmoe_fairseq(?:_compat)?)/[\w./-]*[\w/])(?![{*\w])"
)
LINK = re.compile(r"\]\((?!http)([^)#\s]*)#?([^)]*)\)")
FLAG = re.compile(r"(?<=[\s`\"'(|\[])--([a-z][a-z0-9-]*[a-z0-9])(?![\w*-])")
NOT_HERE = {
    "data-prep/prepare_tales.sh",  # an example
    *("tests/gpu", "tests/test_binaries.py", "tests/speech"),  # fairseq's
    *("use-xmoe", "expert-interval", "ffn-split-ratio"),  # torchscale's, the authors'
    *("rdzv-backend", "rdzv-endpoint", "rdzv-id"),  # torchrun's
}


@pytest.fixture(scope="module")
def sources() -> str:
    """Of this package and of fairseq."""
    stock = Path(fairseq.__file__).parent
    ours = [ROOT / "scripts", ROOT / "data-prep", *ROOT.glob("xmoe_fairseq*")]
    files = [path for folder in [*ours, stock, stock.parent / "fairseq_cli"] for path in folder.rglob("*.*")]
    return "\n".join(path.read_text("utf-8") for path in files if path.suffix in (".py", ".sh", ".toml"))


def headings(document: Path) -> set[str]:
    """As GitHub makes anchors of them."""
    found = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_named_is_there(document: Path, sources: str) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    for file, anchor in LINK.findall(text):
        target = document.parent / file if file else document
        if not target.exists() or (anchor and anchor not in headings(target)):
            missing.append(f"{file}#{anchor}")
    for flag in FLAG.findall(text):
        # fairseq and argparse make it of a field's name, --no-... of one that is on.
        if not any(name in sources for name in (f"--{flag}", flag.replace("-", "_"), f'"{flag}"')):
            missing.append(flag)
    assert not {*missing} - NOT_HERE
