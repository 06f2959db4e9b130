"""The two scripts over packages, with apt itself and a repository in a folder."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from debian import Repository, needs_apt
from prep_scripts import PREP

pytestmark = needs_apt

# fmt: off
WORDS = ["page", "window", "user", "file", "closes", "opens", "shows", "large", "small", "new", "old",
         "table", "line", "border", "paper", "colour"]
# fmt: on


class Text:
    """Sentences, all different, in English and in a language made from it word by word."""

    def __init__(self) -> None:
        self.random = random.Random(5)

    def pairs(self, count: int) -> list[tuple[str, str]]:
        drawn = [self.random.choices(WORDS, k=self.random.randrange(5, 9)) for _ in range(count)]
        return [
            (f"The {' '.join(words)}.", f"Der {' '.join(word[::-1] + 'en' for word in words)}.")
            for words in drawn
        ]

    def both(self, form: str, count: int) -> list[bytes]:
        """The form so often in each language, {text} and {number} filled in."""
        return [
            "".join(form.format(text=text, number=i) for i, text in enumerate(side)).encode()
            for side in zip(*self.pairs(count), strict=True)
        ]


def publish_core(repository: Repository) -> dict[str, str]:
    """The core of packages/mt.txt for German, small, with descriptions; the environment for apt."""
    text = Text()
    lines = (PREP / "packages" / "mt.txt").read_text().splitlines()
    names = [
        line.split()[2].replace("{lang}", "de").split("|")[0] for line in lines if line.startswith("core ")
    ]
    files: dict[str, dict[str, bytes]] = {name: {} for name in names}
    help_page = "usr/share/libreoffice/help/{}/text/{}.html"
    for page in range(40):
        sides = text.both('<p id="p{number}">{text}</p>', 3)
        files["libreoffice-help-en-us"][help_page.format("en-US", page)] = sides[0]
        files["libreoffice-help-de"][help_page.format("de", page)] = sides[1]
        sides = [gzip.compress(b".SH NAME\n" + side) for side in text.both(".PP\n{text}\n", 2)]
        files["manpages"][f"usr/share/man/man1/{page}.1.gz"] = sides[0]
        files["manpages-de"][f"usr/share/man/de/man1/{page}.1.gz"] = sides[1]
        sides = text.both("<page xmlns='x'><p>{text}</p></page>", 1)
        files["gnome-user-docs"][f"usr/share/help/C/gnome-help/{page}.page"] = sides[0]
        files["gnome-user-docs"][f"usr/share/help/de/gnome-help/{page}.page"] = sides[1]
        sides = text.both("<html><body><p>{text}</p></body></html>", 1)
        files["debian-reference-en"][f"usr/share/debian-reference/ch{page}.en.html"] = sides[0]
        files["debian-reference-de"][f"usr/share/debian-reference/ch{page}.de.html"] = sides[1]
        catalogue, compiled = Catalog(locale="de"), io.BytesIO()
        for pair in text.pairs(3):
            catalogue.add(*pair)
        write_mo(compiled, catalogue)
        files["libreoffice-l10n-de"][f"usr/lib/lo/de/LC_MESSAGES/{page}.mo"] = compiled.getvalue()
    for name, contents in files.items():
        repository.add(name, contents)
    stanza = "Package: p{number}\nDescription-md5: {number:032x}\nDescription-LANG: {text}\n\n"
    indexes = [side.decode() for side in text.both(stanza, 40)]
    return repository.publish(
        {lang: index.replace("LANG", lang) for lang, index in zip(("en", "de"), indexes, strict=True)}
    )


def prepare(script: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(PREP / script), *map(str, args)]
    settings = {**os.environ, "VENV": sys.prefix, "VOCAB_SIZE": "200", "WORKERS": "1", **environment}
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)


def test_the_translation_corpus_from_packages(tmp_path: Path, stubbed: dict[str, str]) -> None:
    settings = {**publish_core(Repository(tmp_path / "repository")), "VENV": stubbed["VENV"]}
    settings.update(PACKAGES=str(tmp_path / "packages"), VALID="48", TEST="64")
    out = tmp_path / "out"
    done = prepare("prepare_packages_mt.sh", "de", out, **settings)
    assert done.returncode == 0, done.stderr
    counts = {path.stem: json.loads(path.read_text()) for path in (out / "counts").iterdir()}
    assert counts["fetch"]["packages"] == 11 and counts["extract"]["broken files"] == 0
    expected = {
        "libreoffice-help": 120,
        "manpages": 80,
        "help": 40,
        "debian-reference-en": 40,
        "descriptions": 40,
    }
    assert {name: counts["extract"][name] for name in expected} == expected
    assert counts["extract"]["libreoffice-l10n-de"] == 120
    assert 48 <= counts["split"]["valid"] <= 60 and 64 <= counts["split"]["test"] <= 80
    assert counts["split"]["test ui"] > 10

    for split in ("train", "valid", "test"):
        for lang in ("en", "de"):
            assert (out / "bin" / f"{split}.en-de.{lang}.bin").exists()
            pieces = (out / "bpe" / f"{split}.{lang}").read_text("utf-8").splitlines()
            lines = (out / "text" / f"{split}.{lang}").read_text("utf-8").splitlines()
            assert [line.replace(" ", "").replace("\u2581", " ").strip() for line in pieces] == lines
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert len(manifest["sources"]) == 12 and manifest["settings"]["tiers"] == "core"
    again = prepare("prepare_packages_mt.sh", "de", out, **settings)
    assert again.stdout.count("\n") == 2 and "steps already done: 11" in again.stdout


def test_the_english_corpus_from_docstrings(tmp_path: Path, stubbed: dict[str, str]) -> None:
    out = tmp_path / "out"
    settings = {**stubbed, "MODULES": "fairseq", "VOCAB_SIZE": "600"}
    done = prepare("prepare_docs_lm.sh", "small", out, **settings)
    assert done.returncode == 0, done.stderr
    counts = {path.stem: json.loads(path.read_text()) for path in (out / "counts").iterdir()}
    assert counts["extract"]["words"] == counts["extract"]["fairseq words"] > 20_000
    assert counts["documents"]["train words"] == counts["drop-near"]["words"]
    assert counts["bpe-test"]["unknown"] == 0
    (source,) = json.loads((out / "manifest.json").read_text("utf-8"))["sources"]
    assert (source["name"], source["version"]) == ("fairseq docstrings", "0.12.2")
    assert {path.name for path in (out / "bin").iterdir()} >= {f"{s}.bin" for s in ("train", "valid", "test")}


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("prepare_packages_mt.sh", ["fr"], "de|ru|uk|he|zh [--full] [OUT]; got 'fr'"),
        ("prepare_packages_mt.sh", ["de", "--ful"], "[--full] [OUT]; got '--ful'"),
        ("prepare_docs_lm.sh", ["large"], "[small|open|all] [OUT]; got 'large'"),
    ],
)
def test_usage(script: str, args: list[str], message: str, tmp_path: Path) -> None:
    done = prepare(script, *args, PACKAGES=str(tmp_path))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
