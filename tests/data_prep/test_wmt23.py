"""prepare_wmt23.sh, with a stand-in for mtdata and with mtdata itself."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prep_scripts import NEEDS_CURL, PREP, prepare
from wmt_sources import last_line, pairs, put_testset, tgz

pytestmark = NEEDS_CURL

MTDATA = PREP.parent / ".venv.mtdata" / "bin" / "mtdata"
# Stands in for mtdata: its arguments, its files, and what it says when a server has no such file.
FAKE_MTDATA = f"""#!{sys.executable}
import pathlib, sys
task, args = sys.argv[1], sys.argv[2:]
if task == "--version":
    sys.exit(print("mtdata 0.4.0 "))
known = {{"Statmt-news-1-deu-eng": 200, "OPUS-web-v1-eng_GB-deu": 100, "Statmt-dead-1-deu-eng": 0}}
if task == "list":
    sys.exit(print(*(f"{{name}}\\thttp://example.org/{{name}}\\t" for name in known), sep="\\n"))
assert args[:2] == ["-l", "deu-eng"] and "--fail" in args, args
out = pathlib.Path(args[args.index("-o") + 1], "train-parts")
out.mkdir(parents=True, exist_ok=True)
for name in args[args.index("-tr") + 1 : args.index("-o")]:
    if not known[name]:
        print(f"2023-01-01 data.add_parts ERROR:: Unable to add {{name}}: 404", file=sys.stderr)
        sys.exit("Traceback (most recent call last): ...")
    for lang in name.split("-")[-2:]:
        lines = [f"{{name}} line {{i}} lorem ipsum dolor" for i in range(known[name])]
        text = [line.upper() if lang == "deu" else line for line in lines]
        (out / f"{{name}}.{{lang}}").write_text("\\n".join(text) + "\\n")
"""


@pytest.fixture
def wmt23(stubbed: dict[str, str], tmp_path: Path) -> dict[str, str]:
    for name, translator in (("wmt20", ""), ("wmt21", "A"), ("wmt22", "A"), ("wmt23", "refA")):
        put_testset(tmp_path / "sacrebleu", name, "de-en", 15, translator)
    tool = tmp_path / "mtdata"
    tool.write_text(FAKE_MTDATA)
    tool.chmod(0o755)
    (tmp_path / "recipes.yml").write_text(
        "- id: wmt23-deen\n  langs: deu-eng\n  train:\n  - Statmt-news-1-deu-eng\n"
        "  - - OPUS-web-v1-eng_GB-deu\n    - Statmt-dead-1-deu-eng\n  mono_train:\n  - Statmt-huge-1-eng\n"
    )
    return {
        **stubbed,
        "SACREBLEU": str(tmp_path / "sacrebleu"),
        "MTDATA_TOOL": str(tool),
        "WMT23_RECIPES": f"file://{tmp_path}/recipes.yml",
        "VOCAB_SIZE": "150",
        "FETCH_RETRIES": "0",
    }


def test_wmt23(wmt23: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    cause = last_line(prepare("wmt23", "de-en", out, **wmt23))
    assert "mtdata get: Unable to add Statmt-dead-1-deu-eng: 404" in cause and "--skip" in cause
    assert not (out / "raw" / "parts.txt").exists()
    done = prepare("wmt23", "de-en", out, SKIP="Statmt-dead-1-deu-eng", **wmt23)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"]["train"]["kept"] == 300 and manifest["counts"]["valid"]["kept"] == 30
    expected = {
        "skip": "Statmt-dead-1-deu-eng",
        "valid": "wmt20,wmt21",
        "test": "wmt22,wmt23",
        "mtdata": "0.4.0",
    }
    assert manifest["settings"].items() >= expected.items()
    news = next(s for s in manifest["sources"] if s["source"] == "Statmt-news-1-deu-eng")
    assert news["url"] == "http://example.org/Statmt-news-1-deu-eng" and news["lines"] == 200
    for lang, line in (("de", "OPUS-WEB-V1-ENG_GB-DEU LINE 7"), ("en", "OPUS-web-v1-eng_GB-deu line 7")):
        assert line in (out / "text" / f"train.{lang}").read_text()
    assert (out / "bin" / "test1.de-en.en.bin").exists()


def test_wmt23_failures(wmt23: dict[str, str], tmp_path: Path) -> None:
    assert "the pair must be uk-en, de-en" in prepare("wmt23", "fr-en", **wmt23).stderr
    if not MTDATA.exists():
        missing = prepare("wmt23", "de-en", tmp_path / "a", **{**wmt23, "MTDATA_TOOL": ""})
        assert missing.stderr.count("\n") == 1 and "pip install mtdata==0.4.0" in missing.stderr
    gone = {**wmt23, "WMT23_RECIPES": f"file://{tmp_path}/gone.yml"}
    assert "cannot fetch file://" in last_line(prepare("wmt23", "de-en", tmp_path / "b", **gone))
    (tmp_path / "recipes.yml").write_text("<html>moved</html>\n")
    assert "not a list of mtdata recipes" in last_line(prepare("wmt23", "de-en", tmp_path / "c", **wmt23))
    (tmp_path / "recipes.yml").write_text("- id: wmt22-deen\n  train: [x]\n")
    assert "no recipe 'wmt23-deen'" in last_line(prepare("wmt23", "de-en", tmp_path / "d", **wmt23))


@pytest.mark.slow
@pytest.mark.skipif(not MTDATA.exists(), reason="needs mtdata in .venv.mtdata, see prepare_wmt23.sh")
def test_wmt23_with_mtdata_itself(wmt23: dict[str, str], tmp_path: Path) -> None:
    """Its downloads lie in its cache already: a table whose first column is a score, and an archive."""
    rows = pairs("wikimatrix", 200)
    held = pairs("flores", 20)
    table = gzip.compress("".join(f"1.05\t{en}\t{uk}\n" for en, uk in rows).encode())
    flores = {f"flores200_dataset/dev/{lang}.dev": [pair[side] for pair in held]
              for side, lang in enumerate(("eng_Latn", "ukr_Cyrl"))}  # fmt: skip
    for url, name, body in (
        (
            "https://dl.fbaipublicfiles.com/laser/WikiMatrix/v1/WikiMatrix.en-uk.tsv.gz",
            "wikimatrix.tsv.gz",
            table,
        ),
        ("https://tinyurl.com/flores200dataset", "flores200_dataset.tar.gz", tgz(flores)),
    ):
        digest = hashlib.md5(url.encode()).hexdigest()
        file = tmp_path / "cache" / (urlsplit(url).hostname or "") / digest[:4] / digest[4:] / name
        file.parent.mkdir(parents=True)
        file.write_bytes(body)
        file.with_name(f"{name}._valid").touch()
    for name, translator in (("wmt22", "A"), ("wmt23", "refA")):
        put_testset(tmp_path / "sacrebleu", name, "uk-en", 15, translator)
    (tmp_path / "recipes.yml").write_text("- id: wmt23-uken\n  train: [Facebook-wikimatrix-1-eng-ukr]\n")
    settings = {**wmt23, "MTDATA": str(tmp_path / "cache"), "MTDATA_TOOL": str(MTDATA)}
    done = prepare("wmt23", "uk-en", tmp_path / "out", **settings)
    assert done.returncode == 0, done.stderr
    for lang, side in (("en", 0), ("uk", 1)):
        for name, lines in (("train", rows), ("valid", held)):
            text = (tmp_path / "out" / "text" / f"{name}.{lang}").read_text().splitlines()
            assert text == [pair[side] for pair in lines]
