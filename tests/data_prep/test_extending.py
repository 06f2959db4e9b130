"""The corpora that docs/extending.md adds, as they stand there, in a copy of data-prep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from documented import example
from prep_scripts import NEEDS_CURL, PREP, prepare
from stand_ins import COMMIT, Files, Hub, parquet, serve
from wmt_sources import tgz

HEADING = "## A corpus"


@pytest.fixture
def prep(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PREP, tmp_path / "data-prep", ignore=shutil.ignore_patterns("__pycache__")))


def manifest(prep: Path, name: str, script: str, *args: str, **environment: str) -> dict[str, Any]:
    """Of the corpus, which lies in data/NAME unless told."""
    done = prepare(script, *args, prep=prep, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads((prep.parent / "data" / name / "manifest.json").read_text())


def test_a_line_in_the_list_of_the_hub(prep: Path, stubbed: dict[str, str]) -> None:
    line = example("extending.md", HEADING, "text")
    with (prep / "hub.txt").open("a") as file:
        file.write(line)
    files = {
        "data/train-00000.parquet": parquet([f"title {i}\nthe body of {i} has words" for i in range(90)])
    }
    with serve(Hub, files, repo="roneneldan/TinyStories") as (url, _):
        options = {"VOCAB_SIZE": "300", "VALID_PERCENT": "15", "TEST_PERCENT": "15", "HF_ENDPOINT": url}
        made = manifest(prep, "lm-tiny-stories", "lm", "tiny-stories", **stubbed, **options)
    assert made["counts"]["documents"]["documents"] == 90
    assert made["sources"][0]["revision"] == COMMIT and made["sources"][0]["licence"] == line.split()[-1]


@NEEDS_CURL
def test_a_script_and_its_source(prep: Path, stubbed: dict[str, str]) -> None:
    (prep / "prepare_tales.sh").write_text(example("extending.md", HEADING, "sh"))
    sources = json.loads((prep / "sources.json").read_text())
    source = json.loads(example("extending.md", HEADING, "json"))
    (prep / "sources.json").write_text(json.dumps([*sources, source]))
    texts = {
        f"tales/{split}.{lang}": [f"{text} {split} {i}" for i in range(count)]
        for split, count in {"train": 300, "valid": 20, "test": 30}.items()
        for lang, text in {"en": "the house number", "de": "das Haus Nummer"}.items()
    }
    with serve(Files, {"/tales.tgz": tgz(texts)}) as (url, _):
        made = manifest(prep, "tales-en-de", "tales", **stubbed, URL=f"{url}/tales.tgz", VOCAB_SIZE="60")
    assert [made["counts"][split]["kept"] for split in ("train", "valid", "test")] == [300, 20, 30]
    assert made["sources"] == [source]
    assert (prep.parent / "data" / "tales-en-de" / "bin" / "test.en-de.de.bin").exists()
