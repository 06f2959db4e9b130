"""Who imports whom in a tree, read from the source: also within functions, and for types alone."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

Imports = dict[str, set[str]]  # of each file, by its path within the tree: the files that it imports


def imports(root: Path, folders: Iterable[str]) -> Imports:
    """Of all Python files in these folders of `root`."""
    files = sorted(file for folder in folders for file in (root / folder).rglob("*.py"))
    names = {file: str(file.relative_to(root)) for file in files}
    return {names[file]: {names[each] for each in _imported(file, root) if each in names} for file in files}


def circles(graph: Imports) -> list[list[str]]:
    """Files that import one another, directly or not, each as a way from one of them back to it."""
    found, done = list[list[str]](), set[str]()

    def walk(file: str, way: list[str]) -> None:
        if file in way:
            found.append([*way[way.index(file) :], file])
        elif file not in done:
            for each in sorted(graph[file]):
                walk(each, [*way, file])
            done.add(file)

    for file in sorted(graph):
        walk(file, [])
    return found


def outside(graph: Imports, folder: str, *allowed: str) -> list[str]:
    """What the files of a folder import that lies neither there nor in the folders allowed."""
    inside = tuple(f"{each}/" for each in (folder, *allowed))
    return sorted(
        f"{file} imports {each}"
        for file in graph
        for each in graph[file]
        if file.startswith(inside[0]) and not each.startswith(inside)
    )


def names_in(source: str, package: str = "") -> Iterator[tuple[str, str]]:
    """What is imported, as (module, name in it, or "" where the module itself is meant).

    Args:
        package: that which the source lies in, for imports that begin with a dot.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((each.value, "") for each in node.args[:1] if isinstance(each, ast.Constant))


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """A file's own imports, and the packages that Python runs on the way to them.

    Not those that the file lies in itself: they are under way already, whoever imports it.
    """
    base = next(folder for folder in file.parents if not (folder / "__init__.py").exists())
    package = ".".join(file.parent.relative_to(base).parts)
    for module, name in names_in(file.read_text(), package):
        for folder in (base, root):  # a script finds what lies beside it
            if found := list(_files(folder, [*module.split("."), *([name] if name else [])])):
                last = found[-1]
                on_the_way = [each for each in found[:-1] if each.parent not in file.parents]
                yield from {*on_the_way, last} - {file}
                break


def _files(folder: Path, parts: list[str]) -> Iterator[Path]:
    """Those that Python runs to import a dotted name; its last part may be a thing in a module."""
    for part in parts:
        folder /= part
        if (folder / "__init__.py").is_file():
            yield folder / "__init__.py"
        elif not folder.is_dir():
            if folder.with_suffix(".py").is_file():
                yield folder.with_suffix(".py")
            return
