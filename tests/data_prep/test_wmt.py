"""prepare_wmt14_en_de.sh and prepare_wmt23.sh on cuts of their sources' real formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sacrebleu.dataset
from prep_scripts import PREP, Scripts
from stand_ins import Files, serve

Pairs = list[tuple[str, str]]
WORDS = [a + b for a in ("lorem", "ipsum", "dolor", "sit", "amet") for b in ("a", "e", "i", "o", "us", "um")]
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


def pairs(seed: str, count: int) -> Pairs:
    """English, and German that is English in upper case."""
    rng = random.Random(seed)
    lines = [f"{seed} {i} " + " ".join(rng.choices(WORDS, k=8)) for i in range(count)]
    return [(line, line.upper()) for line in lines]


def tgz(members: dict[str, list[str]]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, lines in members.items():
            body = "".join(line + "\n" for line in lines).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return packed.getvalue()


def sgm(kind: str, lines: list[str]) -> list[str]:
    segments = [f'<seg id="{number}">{line}</seg>' for number, line in enumerate(lines, 1)]
    return [
        f'<{kind} setid="x" srclang="any">',
        '<doc docid="d">',
        "<p>",
        *segments,
        "</p>",
        "</doc>",
        f"</{kind}>",
    ]


def xml(translator: str, source: list[str], target: list[str]) -> str:
    def sides(lines: list[str]) -> str:
        return "<p>" + "".join(f'<seg id="{n}">{line}</seg>' for n, line in enumerate(lines, 1)) + "</p>"

    return (
        f'<dataset id="x"><collection id="c"><doc id="d" origlang="de"><src lang="de">{sides(source)}</src>'
        f'<ref lang="en" translator="{translator}">{sides(target)}</ref></doc></collection></dataset>'
    )


def put_testset(folder: Path, name: str, langpair: str, size: int, translator: str = "") -> Pairs:
    """A test set where sacrebleu keeps it, as if it had been fetched and unpacked before."""
    dataset = sacrebleu.dataset.DATASETS[name]
    entry = dataset.langpairs[langpair]
    members = [entry["path"]] if isinstance(entry, dict) else entry
    raw = folder / name / "raw"
    lines = pairs(name.replace("/", " "), size)
    source, target = ([pair[side] for pair in lines] for side in ((0, 1) if langpair == "en-de" else (1, 0)))
    texts = (
        [xml(translator, source, target)]
        if len(members) == 1
        else ["\n".join(sgm(kind, side)) + "\n" for kind, side in (("srcset", source), ("refset", target))]
    )
    for member, text in zip(members, texts, strict=True):
        (raw / member).parent.mkdir(parents=True, exist_ok=True)
        (raw / member).write_text(text)
    for url in dataset.data:
        (raw / dataset._get_tarball_filename(url)).write_text("unpacked")
    return lines


def prepare(script: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(PREP / f"prepare_{script}.sh"), *map(str, args)]
    return subprocess.run(command, text=True, env=environment, capture_output=True, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What went wrong; the script adds which step it was."""
    assert done.returncode != 0
    cause, step = done.stderr.splitlines()
    assert step.endswith("finished steps are kept")
    return cause


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
