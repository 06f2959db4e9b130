"""Manual pages (troff with the man macros): headings, terms and paragraphs as blocks.

Only what carries running text is understood. Examples, tables and macro definitions are skipped.
"""

from __future__ import annotations

import re
from pathlib import Path

from formats.blocks import Block, read_file

HEADINGS = {"SH", "SS"}
PARAGRAPHS = {"PP", "P", "LP", "TP", "TQ", "IP", "HP", "RS", "RE", *HEADINGS}
VERBATIM = {"nf": "fi", "EX": "EE", "TS": "TE", "de": "."}  # from macro to macro
FONTS = {"B": " ", "I": " ", "SM": " ", "SB": " ", **dict.fromkeys(("BR", "RB", "IR", "RI", "BI", "IB"), "")}
SPECIAL = {
    **{"aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "em": "—", "en": "–", "hy": "-"},
    **{"ga": "`", "ha": "^", "ti": "~", "rs": "\\", "mu": "×", "+-": "±", "co": "©", "bu": "", "bv": "|"},
    **{"Bq": "„", "Fo": "«", "Fc": "»", "fo": "‹", "fc": "›", "->": "→", "<-": "←", "<=": "≤", ">=": "≥"},
}
ESCAPE = re.compile(
    r"\\(?:f(?:\[[^\]]*\]|\(..|.)"  # font
    r"|m\[[^\]]*\]|s[-+]?\d"  # colour, size
    r"|\((?P<two>..)|\[(?P<long>[^\]]*)\]"  # special character
    r"|(?P<one>.))"
)
ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|((?:\\.|\S)+)')
ONE = {"-": "-", "e": "\\", " ": " ", "~": " ", "0": " ", "t": " ", ".": ".", "'": "'", "`": "`"}


def read_manpage(path: Path) -> list[Block]:
    text = read_file(path).decode("utf-8", "replace")
    return [] if text.startswith(".so ") else _Reader().read(text)


def unescape(text: str) -> str:
    return " ".join(ESCAPE.sub(_escaped, text).split())


def _escaped(match: re.Match[str]) -> str:
    if one := match["one"]:
        return ONE.get(one, "")
    name = match["two"] or match["long"] or ""
    if code := re.fullmatch(r"char(\d+)|u([0-9A-F]{4,5})", name):
        return chr(int(code[1]) if code[1] else int(code[2], 16))
    return SPECIAL.get(name, "")


class _Reader:
    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.lines: list[str] = []
        self.tag = ""  # before the first heading there is no text
        self.heading_follows = False  # the next text line is a heading or a term, all of it
        self.skip_until = ""

    def read(self, text: str) -> list[Block]:
        for line in text.split("\n"):
            if re.match(r"[.']?\s*\\\"", line):
                continue
            if macro := re.match(r"[.']\s*([A-Za-z]+|\.)\s*(.*)", line):
                self._macro(*macro.groups())
            elif self.skip_until:
                continue
            elif line.strip():
                self._text(line)
            else:
                self._begin("PP")
        self._flush()
        return self.blocks

    def _macro(self, name: str, rest: str) -> None:
        if self.skip_until:
            if name == self.skip_until:
                self.skip_until = ""
                self._begin("AFTER")
        elif name in VERBATIM:
            if name != "de":
                self._begin("VERBATIM")
                self.blocks.append(Block("VERBATIM", ""))
            self.skip_until = VERBATIM[name]
        elif name in PARAGRAPHS:
            self._paragraph(name, rest)
        elif name in FONTS:
            self._text(FONTS[name].join(_arguments(rest)))
        elif name in ("UR", "MT"):
            self.lines.append(rest)
        elif name in ("UE", "ME") and rest and self.lines:
            self.lines[-1] += rest

    def _paragraph(self, name: str, rest: str) -> None:
        self._begin("PP" if name in ("P", "LP") else name)
        arguments = _arguments(rest)
        if name in HEADINGS and arguments:
            self._text(" ".join(arguments))
            self._begin(name + "-body")
        elif name == "IP" and arguments:
            self._text(arguments[0])
            self._begin("IP-body")
        self.heading_follows = name in ("TP", "TQ") or (name in HEADINGS and not arguments)

    def _text(self, line: str) -> None:
        self.lines.append(line)
        if self.heading_follows:
            self._begin(f"{self.tag}-body")

    def _begin(self, tag: str) -> None:
        self._flush()
        self.tag, self.heading_follows = tag, False

    def _flush(self) -> None:
        text = unescape(" ".join(self.lines))
        self.lines = []
        if self.tag and text:
            self.blocks.append(Block(self.tag, text))


def _arguments(rest: str) -> list[str]:
    return [quoted.replace('""', '"') or plain for quoted, plain in ARGUMENT.findall(rest)]
