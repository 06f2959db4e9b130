"""The embedded sample, and the two scripts that make it into binarised data."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prep_scripts import PREP, prepare

SAMPLE = PREP / "sample"
MT_SIZES = {"CLDR_PAIRS": "2000", "VOCAB_SIZE": "1000"}


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


@pytest.fixture(scope="session")
def mt(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    out = tmp_path_factory.mktemp("mt")
    done = prepare("mt_sample", out, **environment, **MT_SIZES)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    out = tmp_path_factory.mktemp("lm")
    done = prepare("lm_sample", out, **environment, VOCAB_SIZE="1000")
    assert done.returncode == 0, done.stderr
    return out


def test_notice_and_sources_name_every_source_and_licence() -> None:
    notice = (SAMPLE / "NOTICE").read_text("utf-8")
    sources = {entry["source"]: entry for entry in json.loads((SAMPLE / "sources.json").read_text("utf-8"))}
    rows: dict[str, Counter[str]] = {}
    for split in ("train", "valid", "test"):
        with lzma.open(SAMPLE / "en-de" / f"{split}.tsv.xz", "rt", encoding="utf-8") as file:
            for line in file:
                rows.setdefault(line.split("\t")[0], Counter())[split] += 1
    assert len(rows) == 12
    for source, counts in rows.items():
        entry = sources[source]
        taken = ", ".join(f"{counts[split]} {split}" for split in ("train", "valid", "test"))
        section = notice.split(f"\n{source}\n")[1].split("\n\n")[0]
        assert f"{entry['package']} {entry['version']}" in section
        assert taken in section and entry["licence"] in section
        assert all(holder in section for holder in entry["copyright"].split("; "))
        assert entry["rows"] == {split: counts[split] for split in ("train", "valid", "test")}
        assert f"\n{entry['licence']} (" in notice, "the licence's full text"
    for phrase in (
        "Permission is hereby granted",
        "TERMS AND CONDITIONS FOR USE",
        "Neither the name",
        "dedicated to the public domain",
        "sqlite3-doc",
    ):
        assert phrase in notice


def test_no_held_out_text_is_in_training(mt: Path) -> None:
    for lang in ("en", "de"):
        train = {line.casefold() for line in lines(mt / "text" / f"train.{lang}")}
        for split in ("valid", "test", "test1"):
            assert not train & {line.casefold() for line in lines(mt / "text" / f"{split}.{lang}")}
    for lang in ("en", "de"):
        assert not set(lines(mt / "text" / f"valid.{lang}")) & set(lines(mt / "text" / f"test1.{lang}"))


def test_translation_data_is_what_fairseq_reads(mt: Path) -> None:
    load = pytest.importorskip("fairseq.data.data_utils").load_indexed_dataset
    dictionary = pytest.importorskip("fairseq.data").Dictionary.load(str(mt / "bin" / "dict.en.txt"))
    assert (mt / "bin" / "dict.en.txt").read_bytes() == (mt / "bin" / "dict.de.txt").read_bytes()
    assert len(dictionary) % 8 == 0
    for split, size in (("train", None), ("valid", 400), ("test", 500), ("test1", 811)):
        for lang in ("en", "de"):
            data = load(str(mt / "bin" / f"{split}.en-de.{lang}"), dictionary)
            assert len(data) == len(lines(mt / "bpe" / f"{split}.{lang}")) == (size or len(data))
            assert split != "train" or max(data.sizes) <= 251  # 250 pieces and </s>
            if split != "train":  # long pairs are missing there, so its lines have other numbers
                for ids, line in zip(data, lines(mt / "text" / f"{split}.{lang}"), strict=True):
                    assert dictionary.unk() in ids or dictionary.string(ids, "sentencepiece") == line


def test_the_manifest_tells_sources_counts_and_hashes(mt: Path, lm: Path) -> None:
    manifest = json.loads((mt / "manifest.json").read_text("utf-8"))
    assert {entry["licence"] for entry in manifest["sources"]} > {"MIT", "BSD-3-Clause", "Apache-2.0"}
    assert [entry["source"] for entry in manifest["sources"] if entry["synthetic"]] == ["cldr"]
    assert manifest["counts"]["bpe-test1"]["kept"] == 811 and manifest["counts"]["cldr"]["train"] == 2000
    assert manifest["settings"]["vocab_size"] == "1000" and set(manifest["packages"]) >= {"babel", "fairseq"}
    for folder in (mt, lm):
        hashes = json.loads((folder / "manifest.json").read_text("utf-8"))["sha256"]
        assert len(hashes) > 8
        for name, value in hashes.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == value


def test_documents_are_apart_in_language_model_data(lm: Path) -> None:
    fairseq_data = pytest.importorskip("fairseq.data")
    dictionary = fairseq_data.Dictionary.load(str(lm / "bin" / "dict.txt"))
    data = fairseq_data.data_utils.load_indexed_dataset(str(lm / "bin" / "test"), dictionary)
    documents = (lm / "text" / "docs.test").read_text("utf-8").strip().split("\n\n")
    assert sum(size == 1 for size in data.sizes) == len(documents)
    assert all(dictionary.unk() not in data[i] for i in range(len(data)))
    blocks = fairseq_data.TokenBlockDataset(
        data,
        data.sizes,
        512,
        pad=dictionary.pad(),
        eos=dictionary.eos(),
        break_mode="complete_doc",
        document_sep_len=1,
    )
    first = " ".join(dictionary.string(blocks[0], "sentencepiece").split())
    assert " ".join(documents[0].split()).startswith(first[:200])
    for i in range(len(blocks)):
        ends = blocks[i] == dictionary.eos()
        assert not (ends[:-1] & ends[1:]).any(), "a block crosses documents"


def test_an_interrupted_run_resumes_to_the_same_bytes(
    mt: Path, stubbed: dict[str, str], tmp_path: Path
) -> None:
    """As those of a run in one go, but for the files that the instant fairseq-preprocess makes."""
    stubbed |= MT_SIZES
    tool = Path(stubbed["VENV"]) / "bin" / "fairseq-preprocess"
    working = tool.read_text()
    tool.write_text('#!/usr/bin/env bash\necho "disk is full"; exit 3\n')
    out = tmp_path / "out"
    failed = prepare("mt_sample", out, **stubbed)
    assert failed.returncode != 0 and "fairseq-preprocess failed: disk is full" in failed.stderr
    assert not (out / "bin").exists()
    (out / "bin.partial").mkdir()
    tool.write_text(working)
    resumed = prepare("mt_sample", out, **stubbed)
    assert resumed.returncode == 0, resumed.stderr
    assert "steps already done: 14" in resumed.stdout and not (out / "bin.partial").exists()
    again = prepare("mt_sample", out, **stubbed)
    assert again.stdout.count("\n") == 1 and "steps already done: 16" in again.stdout

    def made(folder: Path) -> dict[str, bytes]:
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        return {n: path.read_bytes() for n, path in files.items() if not n.startswith((".steps", "bin"))}

    def manifest(content: bytes) -> dict[str, Any]:
        fields = json.loads(content)
        hashes = {name: value for name, value in fields["sha256"].items() if not name.startswith("bin/")}
        return fields | {"sha256": hashes}

    resumed_files, files = made(out), made(mt)
    assert manifest(resumed_files.pop("manifest.json")) == manifest(files.pop("manifest.json"))
    assert resumed_files == files


def test_a_missing_tool_is_one_line(stubbed: dict[str, str], tmp_path: Path) -> None:
    (Path(stubbed["VENV"]) / "bin" / "fairseq-preprocess").unlink()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(shutil.which(name) or "")
    done = prepare("mt_sample", tmp_path / "a", **{**stubbed, "PATH": str(tools)})
    assert done.returncode != 0
    assert done.stderr == "fairseq-preprocess not found; run: bash scripts/setup.sh\n"
