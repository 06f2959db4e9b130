"""prepare_wmt14_en_de.sh on cuts of its sources' real formats."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from prep_scripts import NEEDS_CURL, PREP, Scripts, prepare
from stand_ins import Files, serve
from wmt_sources import last_line, pairs, put_testset, sgm, tgz

pytestmark = NEEDS_CURL


@pytest.fixture
def wmt14(stubbed: dict[str, str], tmp_path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Settings, and the files on the server."""
    put_testset(tmp_path / "sacrebleu", "wmt13", "en-de", 20)
    held = put_testset(tmp_path / "sacrebleu", "wmt14/full", "en-de", 30)
    files = {}
    for path, prefix, more in (
        ("wmt13/training-parallel-europarl-v7.tgz", "training/europarl-v7.de-en", [("", "LEER")]),
        (
            "wmt13/training-parallel-commoncrawl.tgz",
            "commoncrawl.de-en",
            [held[3], pairs("commoncrawl", 1)[0]],
        ),
        ("wmt14/training-parallel-nc-v9.tgz", "training/news-commentary-v9.de-en", []),
    ):
        lines = pairs(prefix.split("/")[-1].split(".")[0], 100) + more
        files[f"/{path}"] = tgz(
            {f"{prefix}.{lang}": [pair[side] for pair in lines] for side, lang in enumerate(("en", "de"))}
            | {f"{prefix}.fr": ["another language"]}
        )
    settings = {"SACREBLEU": str(tmp_path / "sacrebleu"), "VOCAB_SIZE": "150", "FETCH_RETRIES": "0"}
    return {**stubbed, **settings}, files


def test_wmt14(wmt14: tuple[dict[str, str], dict[str, bytes]], tmp_path: Path) -> None:
    settings, files = wmt14
    out = tmp_path / "out"
    with serve(Files, files, cut=900) as (url, handler):
        assert "curl: (18)" in last_line(prepare("wmt14_en_de", out, STATMT=url, **settings))
        handler.cut = None
        done = prepare("wmt14_en_de", out, STATMT=url, SHARDS="2", **settings)
        assert done.returncode == 0, done.stderr
        again = prepare("wmt14_en_de", out, STATMT=url, SHARDS="2", **settings)
    data = f"{out}/bin:{out}/bin1 is ready"
    assert data in done.stdout and again.stdout.count("\n") == 1 and data in again.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    train = manifest["counts"]["train"]
    assert (train["read"], train["kept"]) == (303, 300)
    assert train["empty side"] == train["in held-out text"] == train["duplicate"] == 1
    assert manifest["settings"]["shards"] == "2" and len(manifest["sources"]) == 5
    for path, body in files.items():
        assert manifest["sha256"][f"raw/{Path(path).name}"] == hashlib.sha256(body).hexdigest()
    assert (out / "text" / "test.de").read_text().splitlines() == [de for _, de in pairs("wmt14 full", 30)]
    shards = [(out / "bpe" / name).read_text().splitlines() for name in ("train.en", "train1.en")]
    assert [len(shard) for shard in shards] == [150, 150]
    assert not (out / "bin1" / "test.en-de.en.bin").exists()


def test_wmt14_unequal_sides(wmt14: tuple[dict[str, str], dict[str, bytes]], tmp_path: Path) -> None:
    settings, files = wmt14
    files["/wmt14/training-parallel-nc-v9.tgz"] = tgz(
        {f"training/news-commentary-v9.de-en.{lang}": ["a b"] * size for lang, size in (("en", 5), ("de", 4))}
    )
    with serve(Files, files) as (url, _):
        cause = last_line(prepare("wmt14_en_de", tmp_path / "out", STATMT=url, **settings))
    assert "news-commentary-v9.de has 4 lines, but" in cause and "parallel files need equal counts" in cause
    assert not (tmp_path / "out" / "text" / "train.en").exists()


def test_a_test_set_is_fetched_and_checked(scripts: Scripts) -> None:
    """sacrebleu's own download, of an archive with its real names."""
    text = sgm("srcset", ["one", "two"]), sgm("srcset", ["eins", "zwei"])
    archive = tgz(
        {f"test/newstest2013-src.{lang}.sgm": t for lang, t in zip(("en", "de"), text, strict=True)}
    )
    patch = """
import runpy, sys, sacrebleu.dataset
url, md5 = sys.argv.pop(1), sys.argv.pop(1)
vars(sacrebleu.dataset.DATASETS["wmt13"]).update(data=[url], md5=[md5])
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    options = ["--sets", "wmt13", "--langpair", "en-de", "--source-out", "v.en", "--target-out", "v.de"]

    def get(url: str, md5: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", patch, url, md5, str(PREP / "wmt_testsets.py"), *options]
        return subprocess.run(
            command,
            cwd=scripts.folder,
            env={"SACREBLEU": str(scripts.folder / "sb"), "PYTHONPATH": ":".join(sys.path)},
            text=True,
            capture_output=True,
        )

    with serve(Files, {"/test.tgz": archive}) as (url, _):
        wrong = get(f"{url}/test.tgz", "0" * 32)
        assert (
            wrong.returncode == 1 and "cannot get wmt13 en-de" in wrong.stderr and "checksum" in wrong.stderr
        )
        assert "HTTP Error 404" in get(f"{url}/gone.tgz", "0" * 32).stderr
        assert not (scripts.folder / "v.en").exists()
        done = get(f"{url}/test.tgz", hashlib.md5(archive).hexdigest())
    assert done.stdout == "wmt_testsets: wmt13 2\n", done.stderr
    assert (scripts.folder / "v.de").read_text() == "eins\nzwei\n"
    message = scripts.fails("wmt_testsets.py", *options, "--langpair", "he-en")
    assert "sacrebleu has no he-en in 'wmt13'" in message
