"""HTML, DocBook and Mallard: paragraphs, headings, terms and cells as blocks."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from lxml import etree
from lxml import html as lxml_html
from lxml.etree import _Element as Element
from textio import DataError

from formats.blocks import Block, read_file

# fmt: off
BLOCKS = {
    "p", "para", "simpara", "title", "subtitle", "term", "entry", "td", "th", "item", "li", "h1", "h2", "h3",
    "h4", "h5", "h6", "dt", "dd", "desc", "caption", "figcaption", "listitem", "row", "tr", "section", "note",
    "steps", "terms", "div", "list", "table", "sect1", "sect2", "sect3", "chapter", "ul", "ol", "dl",
    "blockquote", "pre", "programlisting", "screen", "code-block", "body", "page", "synopsis", "info",
    "comment",
}
SKIPPED = {
    "pre", "programlisting", "screen", "script", "style", "synopsis", "code", "mediaobject",
    "table-of-contents", "nav", "info", "credit", "indexterm", "bookinfo", "articleinfo", "head", "comment",
    "footnote", "cmdsynopsis", "anchor",
}
# fmt: on
SKIPPED_INSIDE = {"indexterm", "footnote", "remark", "script", "style", "inlinemediaobject", "media"}
MENUS = {"guiseq", "menuchoice"}
NAVIGATION = re.compile(r"\b(docnav|navheader|navfooter|titlepage-nav|headerlink)\b")
XML_ENTITIES = {"amp", "lt", "gt", "quot", "apos"}


def read_html(path: Path) -> list[Block]:
    return blocks(_parse_html(path))


def read_docbook(path: Path) -> list[Block]:
    """DocBook and Mallard. Entities of the document's own DTD stand as their names."""
    text = read_file(path).decode("utf-8", "replace")
    text = re.sub(r"<!DOCTYPE[^\[>]*(\[.*?\]\s*)?>|<\?xml[^>]*\?>", "", text, flags=re.S)
    text = re.sub(r"&([A-Za-z][\w.\-]*);", _entity, text)
    parser = etree.XMLParser(recover=True, huge_tree=True, remove_comments=True, resolve_entities=False)
    return blocks(_root(lambda: etree.fromstring(text.encode(), parser)))


def read_numbered_html(path: Path) -> dict[str, str]:
    """LibreOffice help: paragraphs with an id that is the same in all languages."""
    root = _parse_html(path)
    found: dict[str, str] = {}
    if root is not None:
        for variant in root.xpath('//*[@hidden][@class="MAC"]'):  # shown on a Mac instead of its neighbour
            variant.drop_tree()
        for element in root.iter("p", "h1", "h2", "h3", "h4", "h5", "h6"):
            if name := element.get("id"):
                found.setdefault(name, squeeze(text_of(element)))
    return found


def squeeze(text: str) -> str:
    return " ".join(text.split())


def text_of(element: Element) -> str:
    return "".join(_pieces(element))


def _pieces(element: Element) -> Iterator[str]:
    yield element.text or ""
    for child in element:
        name = _name(child)
        if name == "br":
            yield " "
        elif name in MENUS:
            yield " > ".join(filter(None, (squeeze(text_of(k)) for k in child if _name(k) != "shortcut")))
        elif name and name not in SKIPPED_INSIDE and not NAVIGATION.search(child.get("class") or ""):
            yield from _pieces(child)
        yield child.tail or ""


def blocks(root: Element | None) -> list[Block]:
    """Innermost blocks in document order; the tag says what they are and what they lie in."""
    try:
        return [] if root is None else list(_blocks(root, ""))
    except RecursionError:
        raise DataError("nested too deeply to be a text") from None


def _blocks(element: Element, parent: str) -> Iterator[Block]:
    name = _name(element)
    if not name or name in SKIPPED or NAVIGATION.search(element.get("class") or ""):
        return
    if name in BLOCKS and not any(_name(inner) in BLOCKS for inner in element.iterdescendants()):
        yield Block(f"{parent}>{name}" if parent else name, squeeze(text_of(element)))
        return
    for child in element:
        yield from _blocks(child, name)


def _name(element: Element) -> str:
    tag = element.tag  # of comments and the like it is a function
    return tag.rsplit("}", 1)[-1].lower() if isinstance(tag, str) else ""


def _parse_html(path: Path) -> Element | None:
    parser = lxml_html.HTMLParser(encoding="utf-8", remove_comments=True)
    data = read_file(path)
    return _root(lambda: lxml_html.document_fromstring(data, parser=parser))


def _root(parse: Callable[[], Element]) -> Element | None:
    try:
        return parse()
    except (etree.ParserError, etree.XMLSyntaxError):  # an empty document
        return None


def _entity(match: re.Match[str]) -> str:
    if match[1] in XML_ENTITIES:
        return match[0]
    known = html.unescape(match[0])
    return known if known != match[0] else match[1]
