"""Docstrings of Python source files as paragraphs of plain English."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ADDERS = {
    "add_docstr",
    "add_newdoc",
    "_add_newdoc_ufunc",
    "add_docstr_all",
    "add_sample_docs",
}  # for C functions
LEAST_ADDED = 60  # characters, a choice; a shorter argument is the function's name
NOT_PROSE = (">>>", "...", "..", "|", "+--", "$ ")  # examples, directives, tables
RULE = re.compile(r"\s*[-=~^*#+]+\s*")
PARAMETER = re.compile(r"\s*[\w*, .\[\]{}'`]+ ?: ?\S")  # numpydoc's `name : type`
FIELD = re.compile(r"\s*:\w+")  # Sphinx's `:param name:`
ITEM = re.compile(r"^\s*([-*•]|\d+\.)\s+")


def read_docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or of another Python
        return
    for node in ast.walk(tree):
        for docstring in _docstrings(node):
            for paragraph in paragraphs(docstring):
                yield without_markup(paragraph)


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, DOCUMENTED):
        yield ast.get_docstring(node, clean=False) or ""
    elif isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in ADDERS:
            for part in ast.walk(node):
                if (
                    isinstance(part, ast.Constant)
                    and isinstance(part.value, str)
                    and len(part.value) > LEAST_ADDED
                ):
                    yield part.value


def paragraphs(docstring: str) -> Iterator[str]:
    """Running text, list items and descriptions of parameters, each by itself."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = block.split("\n")
        if any(line.lstrip().startswith(NOT_PROSE) or RULE.fullmatch(line) for line in lines):
            continue
        current: list[str] = []  # numbers of words below are choices
        for line in lines:
            names_parameter = PARAMETER.match(line) and len(line.split()) <= 8
            is_field = FIELD.match(line) and len(line.split()) < 4
            if names_parameter or is_field or ITEM.match(line):
                yield " ".join(current)
                current = []
            if not (names_parameter or is_field):
                current.append(ITEM.sub("", line, count=1).strip())
        yield " ".join(current)


def without_markup(text: str) -> str:
    """reStructuredText's inline markup away: the words stay, references to notes go."""
    text = re.sub(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^>`]*>)?`", r"\1", text)  # roles
    text = re.sub(r"`([^`<]+?)\s*<[^>`]*>`_{1,2}", r"\1", text)  # links
    text = re.sub(r"``?([^`]*)``?_?", r"\1", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    text = re.sub(r"(?<!\w)\*([^*\s][^*]*)\*(?!\w)", r"\1", text)
    return re.sub(r"\s*\[\w+\]_", "", text)
