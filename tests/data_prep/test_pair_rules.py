"""pair_rules.py: what is cut away from a pair, and which pairs are refused."""

from __future__ import annotations

import pytest
from languages import language
from pair_rules import anchors_agree, clean, reason_to_refuse, sentences
from textio import DataError


@pytest.mark.parametrize(
    ("source", "target", "cleaned"),
    [
        ("_Open", "Ö_ffnen", ("Open", "Öffnen")),
        ("&File", "&Datei", ("File", "Datei")),
        ("~Insert", "Einfügen", ("Insert", "Einfügen")),
        ("Save _As", "另存为(_A)", ("Save As", "另存为")),
        ("the size_t type", "der Typ size_t", ("the size_t type", "der Typ size_t")),
        ("my_a and my_b", "my_a und mein_b", ("my_a and my_b", "my_a und mein_b")),
        ("AT&T client", "Klient für AT&T", ("AT&T client", "Klient für AT&T")),
        ("%(a_b)s _saved", "%(a_b)s gesichert", ("%(a_b)s _saved", "%(a_b)s gesichert")),
        ("<b>Bold</b> &amp; done\\n", "<b>Fett</b> &amp; fertig", ("Bold & done", "Fett & fertig")),
        ("<para>One.</para><para>Two.</para>", "Eins.<br/>Zwei.", ("One. Two.", "Eins. Zwei.")),
        ("female^I am here", "female^Ich bin hier", ("I am here", "Ich bin hier")),
        ("Stock label|Close", "Schließen", ("Close", "Schließen")),
        ("use of %<%T%>", "Benutzung von %<%T%>", ("use of '%T'", "Benutzung von '%T'")),
        ("* a\u00a0 point", "•  ein Punkt", ("a point", "ein Punkt")),
    ],
)  # fmt: skip
def test_clean(source: str, target: str, cleaned: tuple[str, str]) -> None:
    assert clean(source, target) == cleaned


@pytest.mark.parametrize(
    ("lang", "source", "target", "reason"),
    [
        ("de", "A good house", "Ein gutes Haus", None),
        ("de", "", "Haus", "empty side"),
        ("de", "House \ufffd", "Haus", "empty side"),
        ("de", "Linux", "LINUX", "same text"),
        ("de", "100 % (5)", "100 Prozent", "no sentence"),
        ("de", "{n, plural, one {# day}}", "{n, plural, one {# Tag}}", "no sentence"),
        ("de", "max_size", "größte", "no sentence"),
        ("de", "word " * 101, "Wort " * 90, "length"),
        ("de", "the file is not there", "the file is nicht there", "untranslated"),
        ("de", "A house", "Ein sehr, sehr großes und altes Haus am See", "ratio"),
        ("ru", "A good house", "Хороший дом", None),
        ("ru", "A good house", "Ein gutes Haus", "script"),
        ("uk", "Open GIMP file", "Open GIMP ф", "script"),
        ("he", "A good house", "בית טוב מאוד", None),
        ("zh", "This is a good house", "这是一个好房子", None),
        ("zh", "This is a good house", "Das ist ein gutes Haus", "script"),
        ("zh", "A house", "这是一个非常好的大房子", "ratio"),
    ],
)
def test_reasons(lang: str, source: str, target: str, reason: str | None) -> None:
    assert reason_to_refuse(source, target, language(lang)) == reason


def test_paragraphs_fall_into_sentences_where_both_sides_do() -> None:
    german = language("de")
    assert list(sentences("It is. It was.\n\nEnd", "Es ist. Es war.\n\nEnde", german)) == [
        ("It is.", "Es ist."),
        ("It was.", "Es war."),
        ("End", "Ende"),
    ]
    assert list(sentences("It is. It was.", "Es ist und war.", german)) == [
        ("It is. It was.", "Es ist und war.")
    ]
    far = "Es ist " + "sehr " * 20 + "so. Ja."
    assert list(sentences("It is. It was.", far, german)) == [("It is. It was.", far)]
    assert list(sentences("It is so. It was so.", "它是这样的。它曾是这样的。", language("zh"))) == [
        ("It is so.", "它是这样的。"),
        ("It was so.", "它曾是这样的。"),
    ]


@pytest.mark.parametrize(
    ("source", "target", "agree"),
    [
        ("Set --all in /etc/fstab to 1,000", "Setzen Sie --all in /etc/fstab auf 1.000", True),
        ("Set --all in /etc/fstab", "Siehe auch mount(8) und 25", False),
        ("plain words here", "einfache Worte 1 2 3 hier", False),
        ("plain words here", "einfache Worte", True),
    ],
)
def test_anchors(source: str, target: str, agree: bool) -> None:
    assert anchors_agree(source, target) == agree


def test_an_unknown_language_is_one_line() -> None:
    with pytest.raises(DataError, match="--lang must be one of de, ru, uk, he, zh, got 'fr'"):
        language("fr")
