from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
from prep_scripts import PREP, Scripts


def arguments(scripts: Scripts, source: list[str], target: list[str]) -> list[object]:
    return [
        "--source",
        scripts.write("in.en", *source),
        "--target",
        scripts.write("in.de", *target),
        "--source-out",
        scripts.folder / "out.en",
        "--target-out",
        scripts.folder / "out.de",
    ]


def output(scripts: Scripts) -> list[tuple[str, str]]:
    sides = [(scripts.folder / f"out.{lang}").read_text("utf-8").splitlines() for lang in ("en", "de")]
    return list(zip(*sides, strict=True))


def test_every_reason_is_counted_and_order_is_kept(scripts: Scripts) -> None:
    pairs = [
        ("good one", "gut eins"),
        ("", "leer"),
        ("leer", " \u00a0"),
        ("M\ufffdller", "Müller"),
        ("a " * 251, "b " * 251),
        ("x", "y" * 60),
        ("good one", "gut eins"),
        ("In Test", "anders"),
        ("other", "AUCH im Test"),
        ("good two", "gut zwei"),
    ]
    scripts.write("test.en", "in test")
    scripts.write("test.de", "auch im test")
    printed = scripts.run(
        "clean_pairs.py",
        *arguments(scripts, *map(list, zip(*pairs, strict=True))),
        "--heldout-source",
        "test.en",
        "--heldout-target",
        "test.de",
    )
    assert printed == (
        "clean_pairs: read 10, kept 2, empty side 2, not decoded 1, too long 1, length ratio 1, "
        "in held-out text 2, duplicate 1\n"
    )
    assert output(scripts) == [("good one", "gut eins"), ("good two", "gut zwei")]


def test_text_is_normalised(scripts: Scripts) -> None:
    source, target = "  a\u00a0b\tc\u2028d\x0c ", "u\u0308\u00adber\ufeff\x00 x\r"
    scripts.run("clean_pairs.py", *arguments(scripts, [source], [target]))
    assert output(scripts) == [("a b c d", "\u00fcber x")]


def test_250_words_are_allowed(scripts: Scripts) -> None:
    assert "kept 1," in scripts.run("clean_pairs.py", *arguments(scripts, ["a " * 250], ["b " * 250]))


def test_several_files_are_joined_and_target_chars_scales_the_ratio(scripts: Scripts) -> None:
    out = ["--source-out", "out.en", "--target-out", "out.zh", "--target-chars", "0.2", "--max-ratio", "1.5"]
    for i, length in enumerate((100, 500)):
        scripts.write(f"{i}.en", "x" * length)
        scripts.write(f"{i}.zh", "y" * 100)
    printed = scripts.run("clean_pairs.py", "--source", "0.en", "1.en", "--target", "0.zh", "1.zh", *out)
    assert "read 2, kept 1," in printed and "length ratio 1" in printed


def test_normalize_only_keeps_all_but_refuses_an_empty_side(scripts: Scripts) -> None:
    same = ["a", "a", "b " * 300], ["x", "x", "y"]
    assert scripts.run("clean_pairs.py", *arguments(scripts, *same), "--normalize-only").endswith("kept 3\n")
    for name in ("out.en", "out.de"):
        (scripts.folder / name).unlink()
    options = [*arguments(scripts, ["a", "b"], ["x", " "]), "--normalize-only"]
    assert "in.de:2: empty side" in scripts.fails("clean_pairs.py", *options)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (["a", "b"], ["x"], "in.de has 1 lines, but"),
        (["a"], ["x", "y", "z"], "in.en has 1 lines, but"),
        ([], ["x"], "in.en: file is empty"),
        (["", "a"], ["x", ""], "no pair is left"),
    ],
)
def test_bad_files(scripts: Scripts, source: list[str], target: list[str], message: str) -> None:
    assert message in scripts.fails("clean_pairs.py", *arguments(scripts, source, target))


def test_bad_encoding_names_file_and_line(scripts: Scripts) -> None:
    options = arguments(scripts, ["a", "b"], ["x", "y"])
    (scripts.folder / "in.de").write_bytes(b"gut\n\xfcber\n")
    assert "in.de:2: not UTF-8" in scripts.fails("clean_pairs.py", *options)


def test_missing_file_and_bad_flags(scripts: Scripts) -> None:
    options = arguments(scripts, ["a"], ["x"])
    message = scripts.fails("clean_pairs.py", *options, "--max-words", 0)
    assert "--max-words must be at least 1, got 0" in message
    for value in (0.5, float("nan"), -1):
        message = scripts.fails("clean_pairs.py", *options, "--max-ratio", value)
        assert f"--max-ratio must be 0 (no limit) or at least 1, got {float(value)}" in message
    message = scripts.fails("clean_pairs.py", *options, "--target-out", "out.en")
    assert "out.en: named for two outputs" in message
    assert "give pairs" in scripts.fails("clean_pairs.py", *options, "--source", "in.en", "in.en")
    (scripts.folder / "in.de").unlink()
    assert "in.de: No such file" in scripts.fails("clean_pairs.py", *options)


def test_cut_off_archive(scripts: Scripts) -> None:
    packed = PREP / "sample" / "en-de" / "test.tsv.xz"
    (scripts.folder / "cut.tsv.xz").write_bytes(packed.read_bytes()[:9000])
    out = ["--source-out", "o.en", "--target-out", "o.de"]
    message = scripts.fails("split_tsv.py", "--tsv", "cut.tsv.xz", *out)
    assert "cut.tsv.xz: cannot unpack after line" in message


def test_damaged_archive(scripts: Scripts) -> None:
    options = arguments(scripts, ["a"], ["x"])
    packed = bytearray(gzip.compress(b"a line\n" * 1000))
    packed[20:30] = b"\xff" * 10
    (scripts.folder / "in.gz").write_bytes(packed)
    message = scripts.fails("clean_pairs.py", *options, "--source", "in.gz")
    assert "in.gz: cannot unpack after line" in message


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off for what it starts with &
sys.argv, sys.path[0] = sys.argv[1:], sys.argv[1].rpartition("/")[0]
import clean_pairs
plain = clean_pairs.copy_first
def copy_first(side, file, bits):
    for number, line in enumerate(plain(side, file, bits)):
        if (side.name, number) == ("target", 1000):
            file.flush()
            os.kill(os.getpid(), signal.{})
        yield line
clean_pairs.copy_first = copy_first
clean_pairs.run(clean_pairs.main)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_kill_leaves_nothing_under_the_final_name(scripts: Scripts, name: str) -> None:
    lines = [f"line {i}" for i in range(2000)]
    options = arguments(scripts, lines, lines)
    command = [sys.executable, "-c", KILLED.format(name), str(PREP / "clean_pairs.py"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scripts.folder)
    assert not (scripts.folder / "out.en").exists() and not (scripts.folder / "out.de").exists()
    assert bool(list(scripts.folder.glob("*.tmp"))) == (name == "SIGKILL")
    if name == "SIGINT":
        assert (done.returncode, done.stdout) == (130, "")
        assert done.stderr == "clean_pairs.py: interrupted; run it again to go on\n"
    scripts.run("clean_pairs.py", *arguments(scripts, ["a"], ["x"]))
    assert output(scripts) == [("a", "x")] and not list(scripts.folder.glob("*.tmp"))


PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_corpus(scripts: Scripts) -> None:
    peaks = []
    for lines in (2_000, 100_000):
        source = [f"{i} " + "lorem ipsum dolor sit amet " * 5 for i in range(lines)]
        options = arguments(scripts, source, source)
        command = [sys.executable, "-c", PEAK, str(PREP / "clean_pairs.py"), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"kept {lines}," in done.stdout
        peaks.append(int(done.stdout.split("peak ")[1]))
    size = (scripts.folder / "in.en").stat().st_size + (scripts.folder / "in.de").stat().st_size
    assert size > 25e6
    assert (peaks[1] - peaks[0]) * 1024 < 8e6, peaks  # digests: 27 bytes a line, more while growing
