"""From messages and paragraphs as found to clean sentence pairs: what is cut away, and what is refused."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from languages import Language
from textio import normalize

Pair = tuple[str, str]

ACCELERATOR_IN_BRACKETS = re.compile(r"\s*[(（][_&~]\w[)）]")  # as Chinese puts it after the label
CONTEXT = re.compile(r"^[\w .()-]{1,60}\^(?=\S)|^(?:[A-Za-z ]+\|)+(?=\S)")  # Wesnoth's, and old GTK's
BREAK = re.compile(r"</?(?:para|p|br|nl|li|item|title)\b[^<>]*>")
TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}>")
LEADING_MARKS = re.compile(r"^[-*•·.:,;|>\s]+(?=\w)")
PLACEHOLDER = re.compile(
    r"%\([\w.]+\)[#0\- +]*\d*\.?\d*[a-zA-Z]"  # Python
    r"|%\d+\$[-+ 0#]*\d*(?:\.\d+)?[a-zA-Z]+|%[-+0#]*\d*(?:\.\d+)?(?:ll|l|z|h|q|j|t)*[a-zA-Z@]|%%"  # C
    r"|%L?\d+"  # Qt
    r"|\$\{\w+\}|\$\w+|\{\{?[\w.:! ,\-]*\}?\}"
)
WORD = re.compile(r"[^\W\d_]{2,}")
# All numbers in this file are choices.
LABEL_WORDS = 12  # a text of so many words may be a label with a keyboard accelerator

SENTENCE_END = re.compile(
    r"(?<=[.!?。！？])[\"”“’»)]?\s+(?=[\"„“»«(]?[A-ZÄÖÜА-ЯІЇЄҐ\u0590-\u05ff\u4e00-\u9fff])|(?<=[。！？])(?=\S)"
)
ANCHOR = re.compile(  # what a translator copies: constants, identifiers, calls, numbers, paths, options
    r"[A-Z]{2,}[A-Z0-9]*_\w+|\b[A-Z][A-Z0-9]{3,}\b|\w*[a-z]_\w+|\b\w+\(\d?\)|\d+(?:[.,]\d+)*|/[\w./-]{3,}|--[a-z][\w-]+"
)

REASONS = (
    "anchors differ",
    "empty side",
    "same text",
    "no sentence",
    "length",
    "script",
    "untranslated",
    "ratio",
)
MAX_WORDS = 100


def sentences(source: str, target: str, language: Language) -> Iterator[Pair]:
    """Paragraphs, then sentences, where both sides fall into as many parts of fitting length."""
    parts = re.split(r"\n\s*\n", source), re.split(r"\n\s*\n", target)
    if len(parts[0]) != len(parts[1]):
        parts = [source], [target]
    for paragraphs in zip(*parts, strict=True):
        texts = [" ".join(paragraph.split()) for paragraph in paragraphs]
        cut = [SENTENCE_END.split(text) for text in texts]
        pairs = list(zip(cut[0], cut[1], strict=False))
        fits = len(cut[0]) == len(cut[1]) > 1 and all(0.4 < _ratio(*pair, language) < 2.5 for pair in pairs)
        yield from pairs if fits else [(texts[0], texts[1])]


def _ratio(source: str, target: str, language: Language) -> float:
    return (len(target) / language.length + 5) / (len(source) + 5)


def clean(source: str, target: str) -> Pair:
    """Both sides without markup, escapes, context notes and keyboard accelerators."""
    sides = [_clean_side(side) for side in (source, target)]
    if all(len(side.split()) <= LABEL_WORDS for side in sides):
        for mark in "_&~":
            sides = _drop_accelerators(sides, mark)
    source, target = (LEADING_MARKS.sub("", normalize(side)) for side in sides)
    return source, target


def _clean_side(text: str) -> str:
    text = re.sub(r"%[<>]", "'", text)  # GCC's quotes
    text = CONTEXT.sub("", ACCELERATOR_IN_BRACKETS.sub("", text))
    return re.sub(r"\\[nt]", " ", TAG.sub("", BREAK.sub(" ", html.unescape(text))))


def _drop_accelerators(sides: list[str], mark: str) -> list[str]:
    """`_File` becomes `File`; a name such as `my_file` stays: it is the same on both sides."""
    marked = [re.findall(rf"\w*{mark}\w+", side) for side in sides]
    if max(map(len, marked)) > 1 or any(word.count(mark) > 1 for words in marked for word in words):
        return sides
    if any(word in other for words, other in zip(marked, reversed(sides), strict=True) for word in words):
        return sides
    if any(mark in placeholder for side in sides for placeholder in PLACEHOLDER.findall(side)):
        return sides
    return [re.sub(mark + r"(?=\w)", "", side) for side in sides]


def anchors_agree(source: str, target: str) -> bool:
    """For texts paired by structure only: what is copied in translating must mostly be on both sides."""
    a, b = ({re.sub(r"[.,]", "", found) for found in ANCHOR.findall(side)} for side in (source, target))
    if not a:
        return len(b) <= 2
    if not b:
        return len(a) == 1 or len(source.split()) <= 2
    return len(a & b) >= max(1, 0.5 * len(a))


def reason_to_refuse(source: str, target: str, language: Language) -> str | None:
    """None for a pair that looks like a sentence, or a label, and its translation."""
    if not source or not target or "\ufffd" in source + target:
        return "empty side"
    if source.casefold() == target.casefold():
        return "same text"
    plain = PLACEHOLDER.sub(" ", source)
    if not _is_text(source, plain):
        return "no sentence"
    if not _length(source) <= MAX_WORDS or not 1 <= _length(target) <= MAX_WORDS / min(
        1, 1.8 * language.length
    ):
        return "length"
    if not _in_script(PLACEHOLDER.sub(" ", target), language):
        return "script"
    if language.script is None and _copied(plain, PLACEHOLDER.sub(" ", target)):
        return "untranslated"
    low, high = (0.25, 4.0) if len(source) < 20 else (0.4, 2.5)
    return None if low <= len(target) / (len(source) * language.length) <= high else "ratio"


def _is_text(source: str, plain: str) -> bool:
    if " plural," in source or " select," in source:  # ICU message syntax
        return False
    if " " not in source and "_" in source:
        return False
    ascii_characters = sum(c.isascii() for c in source)
    letters = sum(c.isalpha() for c in plain)
    enough = letters >= 0.5 * len(source.replace(" ", "")) and ascii_characters >= 0.9 * len(source)
    return enough and WORD.search(plain) is not None


def _length(text: str) -> int:
    """Words; a Chinese character counts as one."""
    return len(re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+", text))


def _in_script(target: str, language: Language) -> bool:
    if language.script is None:
        return WORD.search(target) is not None
    own, latin = len(language.script.findall(target)), len(re.findall(r"[A-Za-z]", target))
    return own > 0 and latin <= language.latin_share * (own + latin)


def _copied(source: str, target: str) -> bool:
    words = [{word.casefold() for word in WORD.findall(side)} for side in (source, target)]
    return len(words[0]) >= 4 and len(words[0] & words[1]) > 0.7 * len(words[0])
