"""Print the files that scripts of this folder consist of: each itself, and all that it imports from here."""

from __future__ import annotations

import sys
from modulefinder import ModuleFinder
from pathlib import Path


def files(script: Path) -> set[str]:
    """The script and the modules of its own folder that it imports, directly or not, at any place in it."""
    finder = ModuleFinder(path=[str(script.parent)])
    finder.run_script(str(script))  # which reads it and runs nothing
    return {file for module in finder.modules.values() if (file := vars(module)["__file__"])}


if __name__ == "__main__":
    print(*sorted(set().union(*(files(Path(name)) for name in sys.argv[1:]))), sep="\n")
