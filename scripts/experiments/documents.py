"""Commands and Python of a Markdown document: what is run, and why some are not. How they are marked is
said in scripts/check_docs.sh.

    python scripts/run.py experiments.documents [--list] DOCUMENT

prints a script for bash, which writes a line per block to descriptor 3. With --list, what would be run.
"""

import argparse
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xmoe_fairseq_compat.errors import UserError

MARKS = ("not run", "run by", "first", "sed")
# A comment directly before it, its language, its text.
FENCE = re.compile(r"(?:^<!--\s((?:(?!-->).)*)\s-->\n+)?^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"\n\n {4}\S")


class DocumentError(UserError, ValueError):
    """Commands that are not marked as they should be."""


@dataclass(frozen=True)
class Block:
    place: str  # document:line of its fence
    language: str  # bash or python
    text: str
    marks: dict[str, list[str]]

    @property
    def left_out(self) -> str:
        """Why it is not run; "" = it is."""
        tests = [f"run by {test}" for test in self.marks["run by"]]
        return "; ".join([*self.marks["not run"], *tests])

    def commands(self) -> str:
        """As they are run: what comes first, and the block with what is changed in it.

        Raises:
            DocumentError: a change changes nothing.
        """
        text = self.text
        for change in self.marks["sed"]:
            done = subprocess.run(["sed", change], input=text, capture_output=True, text=True)
            if done.returncode or done.stdout == text:
                reason = done.stderr.strip() or "nothing is changed"
                raise DocumentError(f"{self.place}: sed: {change} must change the block: {reason}")
            text = done.stdout
        if self.language == "python":
            text = f"python - <<'PYTHON'\n{text}PYTHON\n"
        return "\n".join([*self.marks["first"], text])


def blocks(document: Path) -> Iterator[Block]:
    """Those fenced as bash or python.

    Raises:
        DocumentError: commands that are indented instead of fenced; a fence without a language; a mark that
            is none, or names a test that is not there or knows nothing of the document.
    """
    text = document.read_text(encoding="utf-8")
    if indented := INDENTED.search(FENCE.sub(lambda fence: re.sub(r"[^\n]+", "-", fence[0]), text)):
        line = 1 + indented[0].count("\n") + text.count("\n", 0, indented.start())
        raise DocumentError(f"{document}:{line}: must be fenced (```bash, ```text, ...), not indented")
    for fence in FENCE.finditer(text):
        comment, language, commands = fence.groups()
        place = f"{document}:{1 + text[: fence.start(2)].count(chr(10))}"
        if not language:
            raise DocumentError(f"{place}: a fence must name its language (```bash, ```text, ...)")
        if language in ("bash", "python"):
            yield Block(place, language, commands, read_marks(place, comment or "", document))


def read_marks(place: str, comment: str, document: Path) -> dict[str, list[str]]:
    marks: dict[str, list[str]] = {name: [] for name in MARKS}
    for line in filter(None, map(str.strip, comment.splitlines())):
        name, _, value = line.partition(": ")
        if name not in MARKS or not value:
            raise DocumentError(f"{place}: a mark must be one of {', '.join(MARKS)}, and ': ', got {line}")
        marks[name].append(value)
    for test in marks["run by"]:
        if not Path(test).is_file() or document.name not in Path(test).read_text(encoding="utf-8"):
            raise DocumentError(f"{place}: run by: must be a file that names {document.name}, got {test}")
    return marks


def script(document: Path) -> str:
    """Runs all blocks in one shell, as somebody would who goes through the document."""
    lines = ["set -eo pipefail", "trap '[ $? = 0 ] || echo FAILED >&3' EXIT"]
    for block in blocks(document):
        if block.left_out:
            lines.append(f"echo {shlex.quote(f'{block.place}: not run: {block.left_out}')} >&3")
        else:
            lines += [f"printf '%s: ' {block.place} >&3; started=$SECONDS", block.commands()]
            lines.append('echo "ran in $((SECONDS - started)) s" >&3')
    return "\n".join(lines)


def listing(document: Path) -> str:
    return "\n".join(
        f"{block.place}: not run: {block.left_out}"
        if block.left_out
        else f"{block.place}:\n{block.commands()}".rstrip().replace("\n", "\n    ")
        for block in blocks(document)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="say what would be run")
    parser.add_argument("document", type=Path)
    args = parser.parse_args()
    print(listing(args.document) if args.list else script(args.document))


if __name__ == "__main__":
    main()
