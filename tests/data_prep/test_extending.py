"""The corpora that docs/extending.md adds, as they stand there, in a copy of data-prep."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documented import example
from prep_scripts import NEEDS_CURL, PREP
from stand_ins import COMMIT, Files, Hub, serve

HEADING = "## A corpus"


@pytest.fixture
def prep(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PREP, tmp_path / "data-prep", ignore=shutil.ignore_patterns("__pycache__")))


def prepare(script: Path, name: str, *args: str, **environment: str) -> tuple[Path, dict[str, Any]]:
    """The corpus' folder, by default data/NAME, and its manifest."""
    command = ["bash", str(script), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = script.parents[1] / "data" / name
    return folder, json.loads((folder / "manifest.json").read_text())


def test_a_line_in_the_list_of_the_hub(prep: Path, stubbed: dict[str, str]) -> None:
    line = example("extending.md", HEADING, "text")
    with (prep / "hub.txt").open("a") as file:
        file.write(line)
    packed = io.BytesIO()
    pq.write_table(pa.table({"text": [f"title {i}\nthe body of {i} has words" for i in range(90)]}), packed)
    files = {"data/train-00000-of-00001.parquet": packed.getvalue()}
    with serve(Hub, files, repo="roneneldan/TinyStories") as (url, _):
        options = {"VOCAB_SIZE": "300", "VALID_PERCENT": "15", "TEST_PERCENT": "15"}
        settings = {**stubbed, **options, "HF_ENDPOINT": url}
        _, manifest = prepare(prep / "prepare_lm.sh", "lm-tiny-stories", "tiny-stories", **settings)
    assert manifest["counts"]["documents"]["documents"] == 90
    assert (
        manifest["sources"][0]["revision"] == COMMIT and manifest["sources"][0]["licence"] == line.split()[-1]
    )


@NEEDS_CURL
def test_a_script_and_its_source(prep: Path, stubbed: dict[str, str]) -> None:
    script = prep / "prepare_tales.sh"
    script.write_text(example("extending.md", HEADING, "sh"))
    sources = json.loads((prep / "sources.json").read_text())
    source = json.loads(example("extending.md", HEADING, "json"))
    (prep / "sources.json").write_text(json.dumps([*sources, source]))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for split, count in {"train": 300, "valid": 20, "test": 30}.items():
            for lang, text in {"en": "the house number", "de": "das Haus Nummer"}.items():
                body = "".join(f"{text} {split} {i}\n" for i in range(count)).encode()
                member = tarfile.TarInfo(f"tales/{split}.{lang}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    with serve(Files, {"/tales.tgz": packed.getvalue()}) as (url, _):
        folder, manifest = prepare(script, "tales-en-de", **stubbed, URL=f"{url}/tales.tgz", VOCAB_SIZE="60")
    assert [manifest["counts"][split]["kept"] for split in ("train", "valid", "test")] == [300, 20, 30]
    assert manifest["sources"] == [source] and (folder / "bin" / "test.en-de.de.bin").exists()
