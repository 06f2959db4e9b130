"""The demo's tools on made-up runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DEADLINE

from experiments.bigram import END, Bigram

RUN = Path(__file__).parents[2] / "scripts/run.py"


def tool(name: str, *arguments: object) -> str:
    command = [sys.executable, str(RUN), f"experiments.{name}", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE).stdout


def test_bigram_perplexity_by_hand(tmp_path: Path) -> None:
    """Train `a </s>`: pairs (</s>, a) and (a, </s>), both seen once, so all of their mass is held back
    (discount 1) and, in turn, all of the unigrams' mass: uniform over 4 + 2 dictionary entries."""
    (tmp_path / "train").write_text("a\n")
    (tmp_path / "test").write_text("a b\n")
    (tmp_path / "dict").write_text("a 1\nb 1\n")
    tool("bigram", "--train", tmp_path / "train", "--test", tmp_path / "test", "--dict", tmp_path / "dict",
         "--out", tmp_path / "out.json")  # fmt: skip
    assert json.loads((tmp_path / "out.json").read_text()) == {"perplexity": pytest.approx(6.0), "tokens": 3}


def test_bigram_probabilities_sum_to_one(tmp_path: Path) -> None:
    words = [*"abacabda", END, *"bbcadaba"]
    vocabulary = ["a", "b", "c", "d", END, "never", "seen", "x", "y", "z"]
    model = Bigram(iter(words), len(vocabulary))
    for previous in ("a", "b", END, "never"):
        assert sum(model.probability(word, previous) for word in vocabulary) == pytest.approx(1.0)


def write_run(folder: Path, model: str, dense: bool) -> None:
    mt, lm = folder / model / "translation", folder / model / "language_model"
    mt.mkdir(parents=True)
    lm.mkdir()
    for split in ("test", "test1"):  # fairseq prints in order of length
        (mt / f"{split}.out").write_text(
            "S-1\tx\nD-1\t-0.5\tzwei Häuser am See\nD-0\t-0.1\tein kleines Haus dort\n"
        )
    inner = '| train_inner | {"num_updates": "25", "ups": "4", "ppl": "9"}\n'
    (mt / "train.log").write_text(inner)
    (lm / "train.log").write_text(inner * 3)
    (lm / "evaluate.log").write_text("Loss (base 2): 5.0, Perplexity: 32.00\n")
    stats = (
        {}
        if dense
        else {
            f"moe_{s}_{k}": "2.5"
            for s in ("encoder", "decoder")
            for k in ("experts_per_token", "flops_vs_dense_ffn")
        }
    )
    for path, group in ((mt, "test1"), (lm, "test")):
        record = {f"{group}_{key}": value for key, value in stats.items()} | {f"{group}_loss": "1"}
        (path / "validate.log").write_text(f"| {group} | {json.dumps(record)}\n")


def test_report_puts_models_beside_baselines(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for split in ("test", "test1"):
        (text / f"{split}.en").write_text("a small house there\ntwo houses by the lake\n")
        (text / f"{split}.de").write_text("ein kleines Haus dort\nzwei Häuser am See\n")
    write_run(tmp_path, "xmoe", dense=False)
    write_run(tmp_path, "dense", dense=True)
    (tmp_path / "bigram.json").write_text('{"perplexity": 70.25, "tokens": 10}')
    output = tool("report", "--runs", tmp_path, "--models", "xmoe", "dense", "--mt-text", text)
    rows = {row["model"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert rows["xmoe"]["test1_bleu"] == pytest.approx(100)
    assert rows["xmoe"]["experts"] == "2.50, 2.50, 2.50"
    assert rows["xmoe"]["seconds"] == "0.250, 0.250"
    assert rows["dense"]["experts"] == "-, -, -"
    assert rows["dense"]["flops"] == "1.00, 1.00, 1.00"
    assert rows["copying the source"]["test1_chrf"] < 40
    assert rows["bigram (Kneser-Ney)"]["perplexity"] == 70.25
    assert "tok:13a" in output
    assert "two houses by the lake" in output


def test_report_says_when_translations_are_missing(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for split in ("test", "test1"):
        for language in ("en", "de"):
            (text / f"{split}.{language}").write_text("one\ntwo\nthree\n")
    write_run(tmp_path, "xmoe", dense=False)
    with pytest.raises(subprocess.CalledProcessError) as error:
        tool("report", "--runs", tmp_path, "--models", "xmoe", "--mt-text", text)
    assert "2 translations of 3: the evaluation was cut short" in error.value.stderr


def test_plot_draws_a_panel_per_layer(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"encoder.layers.1": [0, 5, 3, 0], "decoder.layers.1": [0, 0, 1, 7]})
    )
    tool("plot_experts", f"translation={tmp_path / 'a.json'}", "--out", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words",
    [
        "bigram --train IN --test b --dict b --out OUT",
        "bigram --train b --test IN --dict b --out OUT",
        "count_experts . --path IN --out OUT",
        "plot_experts T=IN --out OUT",
        "bigram --train /dev/null --test b --dict b --out c",
        "bigram --train c --test b --dict b --out c",
        "plot_experts T=b --out c",
    ],
)
def test_an_input_that_is_the_output_or_wrong_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).write_text("text\n")
    (tmp_path / "soft").symlink_to("a")
    name, *flags = words.replace("IN", "a").replace("OUT", "soft").split()
    with pytest.raises(subprocess.CalledProcessError) as error:
        tool(name, *flags)
    assert error.value.stderr.startswith(f"{name}: ")
    assert error.value.stderr.count("\n") == 1
    assert ("is the input a, which would be overwritten" in error.value.stderr) == ("IN" in words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "soft"]
    assert (tmp_path / "a").read_text() == "text\n"


def test_watch_ends_with_its_processes_and_prints_progress(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"command": ["--max-update", "50"]}')
    (tmp_path / "train.log").write_text('x | INFO | train_inner | {"num_updates": "25", "ppl": "9.5"}\n')
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    try:
        output = tool("watch", f"job:{tmp_path}:{process.pid}")
    finally:
        process.wait()
    assert "job: 25 of 50 updates perplexity 9.5" in output


def test_conversions_side_by_side(tmp_path: Path) -> None:
    def report(grouping: str, updates: int, rows: dict[str, float]) -> dict[str, object]:
        about = {
            "grouping": grouping, "experts": 8, "thresholds": "per layer", "fine-tuned": "all",
            "fine-tuning updates": updates,
        }  # fmt: skip
        measured = {name: {"perplexity": value, "flops": 0.25} for name, value in rows.items()}
        return {"about": about, "reference": {"perplexity": 20}, "rows": measured}

    reports = {
        "a": report("random", 9, {"chosen": 1.0, "budget 1": 20.5}),
        "b": report("random", 0, {"budget 0.5": 30.25, "budget 1": 20.0}),
    }
    for name, content in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    said = tool("compare_conversions", *sorted(tmp_path.glob("*.json"))).splitlines()
    assert said[0] == "dense: perplexity 20.00"
    assert said[2].endswith("| fine-tuning | budget 0.5 | budget 1 |")
    assert said[4:] == [
        "| random | 8 | per layer | none | 30.25 (0.25) | 20.00 (0.25) |",
        "| random | 8 | per layer | 9 updates of all |  | 20.50 (0.25) |",
    ]


def test_an_interrupted_command_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, str(Path(__file__).parents[2] / "scripts/run.py"), "stopped"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert (ended.returncode, ended.stderr) == (130, b"stopped: interrupted\n")
