"""The readers: one small file of each format, with what its readers must not fall for."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from formats.blocks import Block, align
from formats.catalogue import catalogue_pairs
from formats.descriptions import description_blocks, read_index, source_packages
from formats.docstrings import read_docstrings
from formats.manpage import read_manpage
from formats.markup import read_docbook, read_html, read_numbered_html
from formats.plain import read_glosses, read_pod, read_text
from textio import DataError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


PO = r"""
msgid ""
msgstr ""
"PO-Revision-Date: \n"
"Content-Type: text/plain; charset=utf-8\n"

msgid "File"
msgstr "Datei"

msgctxt "verb"
msgid "Open"
msgstr "Öffnen"

msgid "one page"
msgid_plural "%d pages"
msgstr[0] "eine Seite"
msgstr[1] "%d Seiten"

#, fuzzy
msgid "Guess"
msgstr "Geraten"
"""


def test_catalogues(tmp_path: Path) -> None:
    expected = [("File", "Datei"), ("Open", "Öffnen"), ("one page", "eine Seite"), ("%d pages", "%d Seiten")]
    assert list(catalogue_pairs(write(tmp_path, "a.po", PO))) == expected
    catalogue = Catalog(locale="de")
    catalogue.add("File", "Datei")
    catalogue.add("Open", "Öffnen", context="verb")
    catalogue.add(("one page", "%d pages"), ("eine Seite", "%d Seiten"))
    compiled = io.BytesIO()
    write_mo(compiled, catalogue)
    path = tmp_path / "a.mo"
    path.write_bytes(
        compiled.getvalue().replace(b"PO-Revision-Date: YEAR-MO-DA", b"PO-Revision-Date: \n         ")
    )
    assert sorted(catalogue_pairs(path)) == sorted(expected)
    for broken in (b"", b"no catalogue", compiled.getvalue()[:60]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.mo: not a message catalogue"):
            list(catalogue_pairs(path))


MAN = r""".\" a comment
.TH LS 1 "May" "GNU"
.SH NAME
ls \- list \fIdirectory\fR contents
.SH "FILE NAMES"
.PP
Use
.BR stat (2)
for
.I more
it\(aqs \[lq]here\[rq].
.EX
ls example
.EE
After the example.
.TP
.B \-a
Do not ignore names.
.IP \(bu 2
A point.
.de XX
.PP
hidden
..
.SS
Below
Text \e end\&.
"""


@pytest.mark.parametrize("name", ["ls.1", "ls.1.gz"])
def test_manual_pages(tmp_path: Path, name: str) -> None:
    assert read_manpage(write(tmp_path, name, MAN)) == [
        Block("SH", "NAME"),
        Block("SH-body", "ls - list directory contents"),
        Block("SH", "FILE NAMES"),
        Block("PP", "Use stat(2) for more it's “here”."),
        Block("VERBATIM", ""),
        Block("AFTER", "After the example."),
        Block("TP", "-a"),
        Block("TP-body", "Do not ignore names."),
        Block("IP-body", "A point."),
        Block("SS", "Below"),
        Block("SS-body", r"Text \ end."),
    ]
    assert read_manpage(write(tmp_path, "other.1", ".so man1/ls.1\n")) == []


def test_html(tmp_path: Path) -> None:
    page = """<html><head><title>T</title></head><body><h1>Über <b>alles</b><a class="headerlink">¶</a></h1>
    <div class="navheader"><p>Next</p></div><ul><li><p>One<br/>two</p></li><li>three</li></ul>
    <pre>code()</pre><!-- no --><p> a
    b </p></body></html>"""
    expected = [
        Block("body>h1", "Über alles"),
        Block("li>p", "One two"),
        Block("ul>li", "three"),
        Block("body>p", "a b"),
    ]
    assert read_html(write(tmp_path, "a.html", page)) == expected
    assert read_html(write(tmp_path, "a.html.gz", page)) == expected
    assert read_html(write(tmp_path, "empty.html", "")) == []
    (tmp_path / "link.html").symlink_to(tmp_path / "a.html")
    assert read_html(tmp_path / "link.html") == []


def test_docbook_and_mallard(tmp_path: Path) -> None:
    book = """<?xml version="1.0"?><!DOCTYPE book PUBLIC "-//X" "x.dtd" [<!ENTITY kate "Kate">]>
    <chapter><title>About &kate;</title><para>Choose <menuchoice><guimenu>File</guimenu><guimenuitem>Open
    </guimenuitem></menuchoice> &amp; wait&ouml;.<indexterm><primary>x</primary></indexterm></para>
    <programlisting>code</programlisting></chapter>"""
    assert read_docbook(write(tmp_path, "a.docbook", book)) == [
        Block("chapter>title", "About kate"),
        Block("chapter>para", "Choose File > Open & waitö."),
    ]
    page = """<page xmlns="http://projectmallard.org/1.0/"><info><desc>x</desc></info><p>Press
    <guiseq><gui>A</gui><gui>B</gui></guiseq>.</p></page>"""
    assert read_docbook(write(tmp_path, "a.page", page)) == [Block("page>p", "Press A > B.")]
    assert read_docbook(write(tmp_path, "bad.docbook", "")) == []


def test_numbered_html(tmp_path: Path) -> None:
    page = """<html><body><h1 id="h">Title</h1><p id="a">Press <span hidden="true" class="MAC">Cmd</span><span
    class="WIN">Ctrl</span>.</p><p>none</p><p id="a">again</p></body></html>"""
    assert read_numbered_html(write(tmp_path, "a.html", page)) == {"h": "Title", "a": "Press Ctrl."}


def test_package_descriptions(tmp_path: Path) -> None:
    index = """Package: foo
Description-md5: 12
Description-de: kurz
 Ein Absatz
 in zwei Zeilen.
 .
 Zweitens:
  * ein Punkt,
    fortgesetzt

Package: no-translation
Description-md5: 13

"""
    (description,) = read_index(write(tmp_path, "x_Translation-de", index))
    assert (description.package, description.md5) == ("foo", "12")
    assert description_blocks(description.text) == [
        Block("short", "kurz"),
        Block("paragraph", "Ein Absatz in zwei Zeilen."),
        Block("paragraph", "Zweitens:"),
        Block("item", "ein Punkt, fortgesetzt"),
    ]
    write(tmp_path, "x_Packages", "Package: a1\nSource: a (1.0)\n\nPackage: b\n\n")
    assert source_packages(tmp_path) == {"a1": "a"}


def test_alignment() -> None:
    english = [Block("p" if i % 2 else "h", f"text {i}") for i in range(40)]
    german = [Block(block.tag, f"Text {i}") for i, block in enumerate(english)]
    assert list(align(english, german)) == [(f"text {i}", f"Text {i}") for i in range(40)]
    # One block more: the long runs before and after it are still paired, and each text with its own.
    longer = [*german[:20], Block("extra", "neu"), *german[20:]]
    assert list(align(english, longer)) == [(f"text {i}", f"Text {i}") for i in range(40)]
    # A run whose lengths do not fit is not taken; nor are documents of different structure.
    wrong = [*longer[:21], *(block._replace(text=block.text * 9) for block in longer[21:])]
    assert list(align(english, wrong)) == [(f"text {i}", f"Text {i}") for i in range(20)]
    assert list(align(english, [Block("q", "x")] * 40)) == []


def test_docstrings(tmp_path: Path) -> None:
    source = '''"""Module text with `a link <http://x>`_ and :func:`~a.b`."""
def f(a):
    """First line.

    >>> f(1)

    Parameters
    ----------

    a : int
        What **a** is,
        on two lines.
    - an item [1]_
    - ``another``
    """
add_docstr(f, "A docstring that is added to a function written in C, long enough.")
text = "Not documentation, however long it may be, so it must not be found here."
'''
    assert [text for text in read_docstrings(write(tmp_path, "a.py", source)) if text] == [
        "Module text with a link and a.b.",
        "First line.",
        "What a is, on two lines.",
        "an item",
        "another",
        "A docstring that is added to a function written in C, long enough.",
    ]
    assert list(read_docstrings(write(tmp_path, "bad.py", "def {{ name }}("))) == []


def test_plain_formats(tmp_path: Path) -> None:
    assert list(read_text(write(tmp_path, "a.txt.gz", "one\ntwo\n \nthree"))) == ["one\ntwo", "three"]
    pod = "=head1 NAME\n\nUse B<I<this>> and L<that|perlfunc>, C<< $x->y >>.\n\n    code\n"
    assert list(read_pod(write(tmp_path, "a.pod", pod))) == ["Use this and that, $x->y."]
    data = '  1 licence text\n00001740 03 n 01 entity 0 | that which exists; "it is"\n'
    assert list(read_glosses(write(tmp_path, "data.noun", data))) == ["that which exists; it is"]


@pytest.mark.parametrize(
    "body",
    [b"no gzip", gzip.compress(b"text " * 1000, mtime=0)[:-9], b"\x1f\x8b"],
    ids=["no archive", "cut", "a head"],
)
def test_a_damaged_archive_is_named(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "a.gz").write_bytes(body)
    for read in (read_manpage, read_html, read_text):
        with pytest.raises(DataError, match="a.gz: cannot unpack"):
            list(read(tmp_path / "a.gz"))


def test_a_document_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<a>" * 20_000)
    with pytest.raises(DataError, match="nested too deeply"):
        read_docbook(tmp_path / "a.xml")


def test_a_broken_file_among_others_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from extract_english import read_prose

    (tmp_path / "a.gz").write_bytes(b"no gzip")
    assert read_prose(("package", "text", tmp_path / "a.gz")) == ("package", [], 0)
    assert "a.gz: cannot unpack" in capsys.readouterr().err
