"""prepare_lm.sh, and what it is made of, on cuts of its sources' real formats."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from prep_scripts import PREP, Scripts, prepare
from stand_ins import COMMIT, Hub, parquet, serve

sys.path.insert(0, str(PREP))

from encode_gpt2 import fairseq_bpe

WIKITEXT = "wikitext-103-raw-v1"


def articles(name: str, count: int) -> list[str]:
    """A row a line, as in WikiText: rows between that are empty, section titles, marks spaced out."""
    rows = []
    for i in range(count):
        body = f" The well @-@ known {name} {i} ( 1 @,@ 500 m ) isn 't \" far \" , it 's near . \n"
        rows += [
            "",
            f" = {name} {i} = \n",
            "",
            body,
            " = 1 = \n",
            "",
            " = = History = = \n",
            "",
            " More . \n",
        ]
    return rows


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """GPT-2's two files, of a model with three merges."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the")]
    pieces = [*fairseq_bpe().bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({piece: n for n, piece in enumerate(pieces)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    return folder


@pytest.fixture
def wikitext() -> dict[str, bytes]:
    train = articles("dog", 30)
    return {
        f"{WIKITEXT}/train-00000-of-00002.parquet": parquet(train[:100]),  # within an article
        f"{WIKITEXT}/train-00001-of-00002.parquet": parquet(train[100:] + articles("cat", 1)),
        f"{WIKITEXT}/validation-00000-of-00001.parquet": parquet(articles("cat", 3)),
        f"{WIKITEXT}/test-00000-of-00001.parquet": parquet(articles("cow", 4)),
        "wikitext-2-raw-v1/train-00000-of-00001.parquet": b"not asked for",
    }


def test_wikitext_keeps_its_splits(
    wikitext: dict[str, bytes], gpt2: Path, stubbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serve(Hub, wikitext, repo="Salesforce/wikitext") as (url, handler):
        settings = {**stubbed, "HF_ENDPOINT": url, "GPT2_BPE": str(gpt2), "DETOKENIZE": "1", "SHARDS": "2"}
        done = prepare("lm", "wikitext103", out, **settings)
        assert done.returncode == 0, done.stderr
        assert not any("wikitext-2" in path for path in handler.requests if "/resolve/" in path)
        asked = len(handler.requests)
        again = prepare("lm", "wikitext103", out, **settings)
        assert again.stdout.count("\n") == 1 and len(handler.requests) == asked
    manifest = json.loads((out / "manifest.json").read_text())
    documents = manifest["counts"]["documents"]
    assert [documents[name] for name in ("train", "valid", "test", "in held-out text")] == [30, 3, 4, 1]
    assert manifest["sources"][0]["revision"] == COMMIT and len(manifest["sources"][0]["sha256"]) == 4
    assert manifest["settings"] == {"bpe": "gpt2", "shards": "2", "form": "wikitext", "detokenize": "1"}
    train = (out / "text" / "docs.train").read_text()
    assert train.startswith(
        "= dog 0 =\nThe well-known dog 0 (1,500 m) isn't \"far\", it's near.\n"
        "= 1 =\n= = History = =\nMore.\n\n= dog 1 ="
    )
    bpe = fairseq_bpe().get_encoder(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe"))
    shards = [(out / "bpe" / name).read_text().split("\n\n")[:-1] for name in ("train", "train1")]
    assert [len(shard) for shard in shards] == [15, 15]
    decoded = [
        "\n".join(bpe.decode(list(map(int, line.split()))) for line in document.split("\n"))
        for pair in zip(*shards, strict=True)
        for document in pair
    ]
    assert decoded == train.split("\n\n")[:-1]
    dictionary = (out / "bin" / "dict.txt").read_text().splitlines()
    assert dictionary[:2] == ["0 1", "1 1"] and (len(dictionary) + 4) % 8 == 0


def test_the_hub_fails(wikitext: dict[str, bytes], stubbed: dict[str, str], tmp_path: Path) -> None:
    name = f"{WIKITEXT}/train-00001-of-00002.parquet"
    out = tmp_path / "out"
    with serve(Hub, wikitext, repo="Salesforce/wikitext", damaged=(name,)) as (url, handler):
        failed = prepare("lm", "wikitext103", out, **stubbed, HF_ENDPOINT=url)
        assert f"{name}: not what the hub has (size or SHA-256)" in failed.stderr
        assert not (out / "raw" / name).exists() and not (out / "raw" / "files.txt").exists()
        kept = handler.requests.count(f"/datasets/Salesforce/wikitext/resolve/{COMMIT}/{name}")
        assert kept
        del handler.files[name]
        handler.files.pop(f"{WIKITEXT}/test-00000-of-00001.parquet")
        missing = prepare("lm", "wikitext103", out, **stubbed, HF_ENDPOINT=url)
        assert f"--patterns {WIKITEXT}/test-*.parquet: no such file" in missing.stderr
    down = prepare("lm", "wikitext103", out, **stubbed, HF_ENDPOINT=url)
    assert f"cannot get {url}/datasets/Salesforce/wikitext: " in down.stderr and down.stderr.count("\n") == 2
    nothing = prepare("lm", "no-such-folder", **stubbed)
    assert nothing.stderr.endswith("or a folder, got 'no-such-folder'\n") and nothing.stderr.count("\n") == 1


def test_a_folder_of_every_kind(stubbed: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "own text"
    (folder / "more").mkdir(parents=True)
    documents = [f"title {i}\nthe body of {i} has words" for i in range(90)]
    (folder / "a.txt").write_text("\n\n".join(documents[:30]) + "\n")
    rows = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in documents[30:60])
    (folder / "more" / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "c.parquet").write_bytes(parquet(documents[60:]))
    (folder / "readme.md").write_text("not text for the model")
    out = tmp_path / "out"
    options = {"VOCAB_SIZE": "300", "VALID_PERCENT": "15", "TEST_PERCENT": "15"}
    empty = prepare("lm", tmp_path / "venv" / "bin", out, **stubbed)
    assert "no .txt, .jsonl" in empty.stderr
    done = prepare("lm", folder, out, **stubbed, **options)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"]["documents"]["documents"] == 90
    assert sorted(manifest["sources"][0]["sha256"]) == ["a.txt", "c.parquet", "more/b.jsonl.gz"]
    text = "".join((out / "text" / f"docs.{split}").read_text() for split in ("train", "valid", "test"))
    assert sorted(text.split("\n\n")[:-1]) == sorted(documents)


def test_sentences_without_marks_between_documents(scripts: Scripts) -> None:
    for number in range(2):
        (scripts.folder / f"{number}.parquet").write_bytes(
            parquet([f"s {number} {i} ." for i in range(5500)])
        )
    options = ["--input", "0.parquet", "1.parquet", "--form", "sentences", "--out-prefix", "o"]
    printed = scripts.run(
        "lm_documents.py", *options, "--workers", 2, "--valid-percent", 30, "--test-percent", 30
    )
    assert "documents 11, too short 0" in printed


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("x.parquet", b"PAR1 is not enough", "x.parquet: not a parquet file with a column 'text'"),
        ("x.parquet", parquet([]), "x.parquet: file has no rows"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', 'x.jsonl:2: not an object with a string "text"'),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:40], "x.jsonl.gz: cannot unpack"),
        ("x.txt", b"gut\n\xfcber\n", "x.txt:2: not UTF-8"),
    ],
)
def test_bad_files(scripts: Scripts, name: str, body: bytes, message: str) -> None:
    (scripts.folder / name).write_bytes(body)
    assert message in scripts.fails("lm_documents.py", "--input", name, "--out-prefix", "o")


def test_gpt2_files_are_checked(scripts: Scripts, gpt2: Path) -> None:
    scripts.write("in.txt", "the text")
    files = ["--encoder-json", gpt2 / "encoder.json", "--vocab-bpe", gpt2 / "vocab.bpe"]
    assert "give --input and --output, or --dict" in scripts.fails("encode_gpt2.py", *files)
    pieces = json.loads((gpt2 / "encoder.json").read_text())
    (gpt2 / "encoder.json").write_text(json.dumps({k: v for k, v in pieces.items() if k != "the"}))
    data = ["--input", "in.txt", "--output", "out"]
    assert "lacks pieces of" in scripts.fails("encode_gpt2.py", *files, *data)
    (gpt2 / "encoder.json").write_text("{")
    assert "not GPT-2's encoder.json and vocab.bpe" in scripts.fails("encode_gpt2.py", *files, *data)


def test_a_file_too_few_documents_for_the_shards(scripts: Scripts) -> None:
    scripts.write("in.txt", *(f"the {i}" for i in range(200)))
    scripts.run("train_spm.py", "--input", "in.txt", "--model-prefix", "m", "--vocab-size", 30)
    options = ["--model", "m.model", "--input", "in.txt", "--output", "a", "b"]
    assert "nothing is left for b" in scripts.fails("encode_spm.py", *options)
