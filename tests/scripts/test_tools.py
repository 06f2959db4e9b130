"""The demo's tools on made-up runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import DEADLINE
from forks import tools
from toy import language_model

from experiments import plot_experts, report, watch
from experiments.bigram import END, Bigram
from experiments.evaluation import score
from xmoe_fairseq_compat.errors import UserError

RUN = Path(__file__).parents[2] / "scripts/run.py"


def tool(name: str, *arguments: object) -> str:
    command = [tools() / "python", RUN, f"experiments.{name}", *map(str, arguments)]
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
    """As train.py and score.py leave it."""
    mt, lm = folder / model / "translation", folder / model / "language_model"
    (mt / "score.last").mkdir(parents=True)
    lm.mkdir()
    side = {"experts": 2.5, "flops": 0.75}
    split = {"bleu": 100.0, "chrf": 99.0, "routing": {} if dense else {"encoder": side, "decoder": side}}
    splits = {"test": {**split, "perplexity": 32.0}, "test1": split}
    for run in (mt, lm):
        scores = {"splits": splits, "signatures": {"bleu": "tok:13a", "chrf": "c", "chrf++": "d"}}
        (run / "scores.last.json").write_text(json.dumps(scores))
        ups = 2 if dense else 4
        (run / "train.log").write_text(
            f'| train_inner | {{"num_updates": "25", "ups": "{ups}", "ppl": "9"}}\n'
        )
    for name, sentences, seconds in (("test", "1,000", 2.5), ("test1", "250", 7.5 if dense else 3.75)):
        printed = (
            f"| Translated {sentences} sentences (4,135 tokens) in {seconds}s (320.13 sentences/s, ...)\n"
        )
        (mt / "score.last" / f"{name}.out").write_text(printed)


def test_report_puts_models_beside_baselines(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for split in ("test", "test1"):
        (text / f"{split}.en").write_text("a small house there\ntwo houses by the lake\n")
        (text / f"{split}.de").write_text("ein kleines Haus dort\nzwei Häuser am See\n")
    write_run(tmp_path, "xmoe", dense=False)
    write_run(tmp_path, "dense", dense=True)
    (tmp_path / "bigram.json").write_text('{"perplexity": 70.25, "tokens": 10}')
    output = tool("report", "--runs", tmp_path, "--models", "dense", "xmoe", "--mt-text", text)
    rows = {row["model"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert (rows["xmoe"]["test1_bleu"], rows["xmoe"]["perplexity"]) == (100, 32)
    assert (rows["xmoe"]["flops"], rows["dense"]["flops"]) == ([0.75, 0.75], [1, 1])
    assert (rows["xmoe"]["seconds"], rows["dense"]["seconds"]) == ([0.25, 0.25], [0.5, 0.5])
    assert (rows["xmoe"]["sentence"], rows["dense"]["sentence"]) == (0.005, 0.008)
    assert rows["copying the source"]["test1_chrf"] < 40
    assert rows["bigram (Kneser-Ney)"]["perplexity"] == 70.25
    assert "tok:13a" in output and "chrf++" not in output
    table = (tmp_path / "report.md").read_text()
    assert "| xmoe | 100.0 | 99.0 | 32.0 | 0.75, 0.75 | 0.250, 0.250 | 5.0 |" in table
    assert "0.75 (translation) and 0.75 (language model) of the FFN FLOPs of dense" in table
    assert (
        "0.50 and 0.50 of its time per update and 0.62 of it per translated sentence: CLDR BLEU 100.0 "
        in table
    )


def test_a_translation_that_was_cut_short_has_no_seconds(tmp_path: Path) -> None:
    write_run(tmp_path, "xmoe", dense=False)
    (tmp_path / "xmoe/translation/score.last/test.out").write_text("S-1\tx\n")
    with pytest.raises(UserError, match="score.last: a translation was cut short"):
        report.translating(tmp_path / "xmoe/translation")


def test_a_runs_path_may_have_colons() -> None:
    assert watch.parts("training (a):/runs/10:30/b:77") == ("training (a)", "/runs/10:30/b", "77")


def test_missing_translations_are_not_scored() -> None:
    with pytest.raises(UserError, match="2 translations of 3: the evaluation was cut short"):
        score(["one", "two"], ["one", "two", "three"], ["bleu"])


def test_a_panel_per_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = language_model(decoder_layers=4, moe_router="topk", moe_topk=3, moe_num_experts=4)
    tokens = torch.randint(4, 30, (2, 5))
    batch = {"net_input": {"src_tokens": tokens, "src_lengths": torch.full((2,), 5)}}
    monkeypatch.setattr(plot_experts, "open_model", lambda *_: (model, None, None))
    monkeypatch.setattr(plot_experts, "Batches", lambda *_, **__: [batch, batch])
    words = ["--of", "LM", "checkpoint", "data", "test", "--out", str(tmp_path / "out.png")]
    monkeypatch.setattr(sys, "argv", ["plot_experts", *words])
    plot_experts.main()
    counts = json.loads((tmp_path / "out.json").read_text())
    assert counts == dict.fromkeys(("LM: decoder layer 2", "LM: decoder layer 4"), [0, 0, 0, 20, 0])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words",
    [
        "bigram --train IN --test b --dict b --out OUT",
        "bigram --train b --test IN --dict b --out OUT",
        "bigram --train /dev/null --test b --dict b --out c",
        "bigram --train c --test b --dict b --out c",
        "plot_experts --of a b c d --out a",
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
    """Scores beside the dense model's, and what was trained for them."""
    side = {"decoder": {"experts": 4.0, "flops": 0.26}}
    for name, perplexity, routing in (
        ("dense/scores.last", 20.0, {}), ("hoyer/scores.last", 21.0, {}), ("dense/scores.mass", 30.0, side),
        ("dense/scores.hoyer+task", 22.0, side), ("dense/scores.task+trained", 24.0, side),
    ):  # fmt: skip
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"splits": {"test": {"perplexity": perplexity, "routing": routing}}}))
    (tmp_path / "task+trained").mkdir()
    for name, updates in (("mass", 0), ("hoyer+task", 1500), ("task+trained/begin", 300)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"about": {"fine-tuning updates": updates}}))
    (tmp_path / "times/mass").mkdir(parents=True)
    timed = {"rows": [{"what": "decoding", "batch": 1, "times as fast": "1.50"}]}
    (tmp_path / "times/mass/benchmark.json").write_text(json.dumps(timed))
    tool("compare_conversions", tmp_path, "mass", "hoyer+task", "task+trained", "--last", 1200)
    head, _, *rows = (tmp_path / "ways.md").read_text().strip().splitlines()
    assert head == (
        "| way | trained further | experts | FLOPs | test perplexity | decoding, batch 1: times as fast |"
    )
    assert rows == [
        "| dense |  |  |  | 20.00 |  |",
        "| dense after hoyer | the last 1,200 updates, anew |  |  | 21.00 (+5.0%) |  |",
        "| mass |  | 4.0 | 0.26 | 30.00 (+50.0%) | 1.50 |",
        "| hoyer+task | the last 1,200 updates, anew + 1,500 updates | 4.0 | 0.26 | 22.00 (+10.0%) |  |",
        "| task+trained | the last 1,200 updates, anew + 300 updates | 4.0 | 0.26 | 24.00 (+20.0%) |  |",
    ]


def test_an_interrupted_command_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, str(Path(__file__).parents[2] / "scripts/run.py"), "stopped"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert (ended.returncode, ended.stderr) == (130, b"stopped: interrupted\n")
