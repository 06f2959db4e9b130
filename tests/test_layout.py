"""Files and functions that can be read at a sitting."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("xmoe_fairseq", "xmoe_fairseq_compat", "scripts", "data-prep", "examples")
MOST_LINES, MOST_OF_A_FUNCTION = 210, 40  # a choice; a docstring does not count


def long_ones(path: Path) -> Iterator[str]:
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    if text.count("\n") > MOST_LINES:
        yield name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node, clean=False) else None
            uncounted = 1 + docstring.end_lineno - docstring.lineno if docstring else 0
            if 1 + node.end_lineno - node.lineno - uncounted > MOST_OF_A_FUNCTION:
                yield f"{name}: {node.name}"


def test_files_and_functions_are_short() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    assert not [name for path in paths for name in long_ones(path)]
