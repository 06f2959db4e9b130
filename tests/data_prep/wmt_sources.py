"""Cuts of WMT's sources in their real formats."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
from pathlib import Path

import sacrebleu.dataset

Pairs = list[tuple[str, str]]
WORDS = [a + b for a in ("lorem", "ipsum", "dolor", "sit", "amet") for b in ("a", "e", "i", "o", "us", "um")]


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


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What went wrong; the script adds which step it was."""
    assert done.returncode != 0
    cause, step = done.stderr.splitlines()
    assert step.endswith("finished steps are kept")
    return cause
