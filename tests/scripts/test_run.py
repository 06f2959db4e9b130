"""wmt/run.sh and lm/run.sh: one command from text to a scored model."""

import json
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DEADLINE, REPO, commands_of, for_shells, refusal, script, wait_until
from forks import tools

sys.path.insert(0, str(REPO / "tests/data_prep"))  # prep_scripts

from prep_scripts import PREPROCESS

from experiments import estimate, own_report, own_text
from experiments.plan import Plan

# Stands in for what takes minutes: the timing, the training and the scores. The rest is real.
PYTHON = """#!/usr/bin/env bash
case "${2:-} ${3:-}" in
  "experiments.estimate time")
    echo '{"start": 9, "update": 0.5, "updates": 20, "validation": 4, "parameters": 123456}' >"${!#}" ;;
  experiments.train*)
    run=$7; mkdir -p "$run"
    about='"task": "%s", "preset": "%s", "model": "%s", "data": "%s", "seed": 1, "flags": [], "command": []'
    printf "{$about}" "$3" "$4" "$5" "$6" >"$run/run.json"
    echo '| train_inner | {"num_updates": "3", "ups": "2", "ppl": "9"}' >>"$run/train.log"
    if [ -n "${FAILS:-}" ]; then echo "out of memory"; exit 1; fi
    sleep "${SLOW:-0}"
    echo "$8 $9" >"$run/checkpoint_best.pt"; touch "$run/checkpoint_last.pt" ;;
  experiments.score*)
    side='"routing": {"encoder": {"experts": 1.98, "flops": 0.512}}'
    scores='"bleu": 12.34, "chrf++": 45.6, "perplexity": 7.0, "perplexity_per_word": 50.5'
    echo "{\\"splits\\": {\\"test\\": {$scores, $side}}}" >"$4/scores.best.json"
    mkdir -p "$4/score.best"
    for i in 0 1 2 3; do printf 'D-%s\\t-0.5\\tnumber %s\\n' $i $i; done >"$4/score.best/test.out" ;;
  *) exec REAL "$@" ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    own = tmp_path / "venv" / "bin"
    own.mkdir(parents=True)
    python = PYTHON.replace("REAL", shlex.quote(str(tools() / "python")))
    for name, text in {"python": python, "fairseq-preprocess": PREPROCESS, "fairseq-train": ""}.items():
        (own / name).write_text(text)
        (own / name).chmod(0o755)
    return for_shells() | {"VENV": str(own.parent), "WORKERS": "1"}


def sentences(count: int, seed: int = 1) -> list[str]:
    words = [f"{a}{b}{c}" for a in "klmnp" for b in "aeiou" for c in "rstvw"]
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=9)) for _ in range(count)]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def text(tmp_path: Path) -> tuple[Path, Path]:
    """Parallel text in a folder with an awkward name; a no-break space in each line of one side."""
    folder = tmp_path / "my [text] 100% ü"
    folder.mkdir()
    found = sentences(80)
    return write(folder / "a b.en", found), write(
        folder / "a b.de", [s.upper().replace(" ", "\u00a0", 1) for s in found]
    )


def run(environment: dict[str, str], *arguments: object, succeeds: bool = True, **env: str) -> str:
    done = subprocess.run(
        ["bash", str(REPO / "scripts" / str(arguments[0])), *map(str, arguments[1:])],
        env=environment | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE,
    )  # fmt: skip
    assert (done.returncode == 0) == succeeds, done.stdout[-3000:]
    return done.stdout


def steps(printed: str) -> list[str]:
    names = [line.split("] ")[1] for line in printed.splitlines() if line.startswith("[out")]
    return [name for name in names if " " not in name]


def test_translation(environment: dict[str, str], text: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out 1"
    command = ("wmt/run.sh", "--source", text[0], "--target", text[1], "--updates", 100, out)
    failed = run(environment, *command, succeeds=False, FAILS="1")
    assert "out of memory\n" in failed and "train-xmoe-s4-budget-probability failed; fix the cause" in failed
    printed = run(environment, *command)
    assert steps(printed) == ["train-xmoe-s4-budget-probability", "score-xmoe-s4-budget-probability"]
    assert "[run] text: train 72 pairs, valid 4 pairs, test 4 pairs; " in printed
    assert "123,456 parameters" in printed and "[run] training: 100 updates of at most 600 tokens" in printed
    # 100 updates, four validations, three commands' starts, and the test set, twice
    assert "[run] about 2 minutes with scores, as 20 updates took 0.500 s each just now" in printed
    model = out / "xmoe-s4-budget-probability"
    assert (model / "checkpoint_best.pt").read_text() == "--max-update 100\n"
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            assert "\u00a0" not in (out / f"data/text/{split}.{language}").read_text("utf-8")
    assert json.loads((out / "data/counts/bpe-test.json").read_text())["unknown"] == 0
    assert "The budget is 2 experts per token" not in printed
    report = (out / "report.md").read_text("utf-8")
    assert report.startswith(
        "| model | test BLEU | test chrF++ | experts/token | MoE FLOPs / dense FFN | training seconds |\n"
    )
    assert (
        "\n| xmoe-s4-budget-probability | 12.3 | 45.6 | 1.98 | 0.51 | 2 |\n" in report and report in printed
    )
    assert "translation  number 2\n" in report and "The test set has 4 pairs" in report
    for hint in ("fairseq-interactive ", "xmoe-threshold ", "--model dense", "--sentencepiece-model"):
        assert hint in printed

    longer = run(environment, *command[:-2], 200, out)
    assert [name.partition("-")[0] for name in steps(longer)] == ["train", "score"]
    other = run(environment, *command[:-1], "--model", "dense", out)
    assert "| dense | 12.3 |" in other and "| xmoe-s4-budget-probability | 12.3 |" in other  # side by side

    write(text[0], sentences(80, seed=2))
    refused = run(environment, *command, succeeds=False)
    assert "is a model of other text or another vocabulary; name another OUT" in refused


def test_tsv_and_sets_of_ones_own(environment: dict[str, str], tmp_path: Path) -> None:
    found = sentences(70)
    table = write(tmp_path / "t.tsv", [f"{i}\t{s.upper()}\t{s}" for i, s in enumerate(found[:60])])
    test = write(tmp_path / "test.tsv", [f"{i}\t{s.upper()}\t{s}" for i, s in enumerate(found[50:])])
    options = ("--columns", 3, 2, "--languages", "en", "xx", "--vocab-size", 60)
    printed = run(environment, "wmt/run.sh", "--tsv", table, "--test-tsv", test, *options, tmp_path / "out")
    # ten of the table are in the test: a twentieth of the other fifty is held out
    assert "train 48 pairs, valid 2 pairs, test 20 pairs; 60 pieces" in printed
    data = tmp_path / "out/data"
    assert (data / "text/test.en").read_text().splitlines() == found[50:]
    manifest = json.loads((data / "manifest.json").read_text())
    assert sorted(Path(name).name for name in manifest["sources"][0]["sha256"]) == ["t.tsv", "test.tsv"]


def stopped(words: list[str], log: Path, number: int, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output of a command that gets a signal while it trains; a second is refused then."""
    with subprocess.Popen(
        words, env=environment | {"SLOW": "1000"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: log.exists() or process.poll() is not None)
            assert "is in use by another run.sh" in run(environment, "wmt/run.sh", *words[2:], succeeds=False)
            process.send_signal(number)
            printed, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    return process.returncode, printed


def test_a_stop_ends_all_and_the_same_command_goes_on(
    environment: dict[str, str], text: tuple[Path, Path], tmp_path: Path
) -> None:
    out, model = tmp_path / "out", "xmoe-s4-budget-probability"
    words = ["--source", str(text[0]), "--target", str(text[1]), str(out)]
    command = ["bash", str(REPO / "scripts/wmt/run.sh"), *words]
    log = out / model / "train.log"
    for number in (signal.SIGINT, signal.SIGTERM):
        status, printed = stopped(command, log, number, environment)
        assert status in (128 + number, -number) and "Traceback" not in printed, printed
        wait_until(lambda: not commands_of(str(out)))
        assert not [*out.rglob("checkpoint*")] and not [*out.rglob("*.partial")]
        log.unlink()
    assert steps(run(environment, "wmt/run.sh", *words)) == [f"train-{model}", f"score-{model}"]
    assert steps(run(environment, "wmt/run.sh", *words)) == []


def test_language_model(tmp_path: Path) -> None:
    """All of it is real."""
    book = write(tmp_path / "a book.txt", [*sentences(150), "", *sentences(150, seed=2)])
    out = tmp_path / "out"
    printed = script("lm/run.sh", "--text", book, "--updates", 8, out, WORKERS="1")
    assert "few documents, so they are cut into parts" in printed and "[run] training: 8 updates" in printed
    scores = json.loads((out / "xmoe-s4-budget-probability/scores.best.json").read_text())["splits"]
    assert scores["test"]["perplexity"] > 1 and 1 <= scores["test"]["routing"]["decoder"]["experts"] <= 4
    timing = json.loads((out / "xmoe-s4-budget-probability.timing.json").read_text())
    assert timing["updates"] == 20 and all(value > 0 for value in timing.values())
    assert "| model | test ppl | test ppl/word |" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("task", "words", "why"),
    [
        ("wmt", "--source none --target a o", "--source none: No such file"),
        ("wmt", "--source a a --target a o", "--source and --target must name as many files, got 2 and 1"),
        ("wmt", "--source a --target a --tsv a o", "or --tsv, must be given, not both"),
        ("wmt", "o", "--source and --target, or --tsv, must be given, got neither"),
        ("wmt", "--tsv a --valid-source a o", "--valid-source and --valid-target must name as many files"),
        ("wmt", "--tsv a --columns 2 2 o", "--columns must be two different numbers from 1, got 2 2"),
        ("wmt", "--tsv a --languages en e-n o", "must be two different words such as en de, got en e-n"),
        ("lm", "--text . o", "--text .: is no file"),
        ("lm", "o", "--text must be given"),
        ("lm", "--text a a", "OUT, the last word, must be a folder, got the file a"),
        ("lm", "--text a --updates 0 o", "--updates must be at least 1, got 0"),
        ("lm", "--text a --vocab-size -1 o", "--vocab-size must be auto or a number from 1, got -1"),
        ("lm", "--text a --preset small o", "--preset small wants a GPU, and there is none here; tiny"),
        ("lm", "--text a --model xmoe o", "MODEL must be one of dense"),
        ("lm", "--text a o,p", "OUT must have no comma and no colon, which part folders for"),
    ],
)  # fmt: skip
def test_what_is_refused(
    task: str, words: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("a").write_text("text\n")
    assert why in refusal(own_text.main, monkeypatch, task, *words.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_help_and_text_that_is_wrong(environment: dict[str, str], tmp_path: Path) -> None:
    said = run(environment, "wmt/run.sh", "--help")
    assert said.startswith("usage: bash scripts/wmt/run.sh --source FILE") and "xmoe-s4-budget-prob" in said
    assert "must be OUT, a folder" in run(environment, "lm/run.sh", "--text", succeeds=False)
    assert "unrecognized arguments: --hlep" in run(environment, "lm/run.sh", "--hlep", succeeds=False)
    en, out = write(tmp_path / "a.en", ["one", "two", "three"]), tmp_path / "out"
    refused = run(environment, "lm/run.sh", "--text", en, "--updates", "0", out, succeeds=False)
    assert refused.startswith("run.sh: --updates must be at least 1")
    for content, why in (
        (b"eins\n", "a.de has 1 lines, but"),
        (b"", "a.de: file is empty"),
        (b"eins\nzw\xffi\n\n", "a.de:2: not UTF-8"),
    ):
        (tmp_path / "a.de").write_bytes(content)
        failed = run(
            environment, "wmt/run.sh", "--source", en, "--target", tmp_path / "a.de", out, succeeds=False
        )
        assert why in failed and failed.count("\n") == 4  # what is begun, the step, the line, how to go on


@pytest.mark.parametrize(
    ("experts", "words", "remarks"),
    [
        (1.95, 5000, ()),
        (1.3, 5000, ("budget is 2 experts",)),
        (2.5, 110, ("110 words", "budget is 2 experts")),
    ],
)
def test_what_numbers_do_not_say(
    experts: float, words: int, remarks: tuple[str, ...], tmp_path: Path
) -> None:
    about = {"task": "lm", "preset": "tiny", "model": "dense", "data": "", "seed": 1, "flags": []}
    side = {"encoder": {"experts": experts, "flops": 0.5}}
    test = {"perplexity": 9.0, "perplexity_per_word": 99.0, "words": words, "routing": side}
    (tmp_path / "run.json").write_text(json.dumps(about))
    (tmp_path / "scores.best.json").write_text(json.dumps({"splits": {"test": test}}))
    (tmp_path / "train.log").touch()
    said = own_report.remarks(tmp_path, 2)
    assert said.count("\n") == 2 * len(remarks) and all(remark in said for remark in remarks)


def test_how_many_updates_are_done(tmp_path: Path) -> None:
    """A run that was stopped has one checkpoint, without a number in its name."""
    log = [
        f"| Saved checkpoint {tmp_path}/checkpoint_last.pt (epoch 2 @ {n} updates, score None)"
        for n in (9, 120)
    ]
    write(tmp_path / "train.log", log)
    assert estimate.done(tmp_path) == 0  # it has been removed
    (tmp_path / "checkpoint_last.pt").touch()
    assert estimate.done(tmp_path) == 120


def test_how_many_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, paper = Plan("wmt", "tiny", "xmoe-s4"), Plan("wmt", "paper", "xmoe-s4", 1)
    assert [estimate.updates_of(tiny, tokens, None) for tokens in (10, 6000, 10**7)] == [1, 200, 1800]
    assert estimate.updates_of(tiny, 6000, 77) == 77
    assert estimate.updates_of(paper, 2**20 * 50, None) == 500  # its ten epochs
    assert estimate.flags_for(tiny, 200) == {
        "max-update": 200, "total-num-update": 200, "warmup-updates": 22, "save-interval-updates": 55,
        "log-interval": 2, "validate-interval-updates": 55,
    }  # fmt: skip
    assert estimate.flags_for(tiny, 1800) == {}
    assert estimate.flags_for(tiny, 4000) == {"max-update": 4000, "total-num-update": 4000}


@pytest.mark.parametrize(("task", "preset", "said"), [("lm", "tiny", 1), ("lm", "small", 0)])
def test_a_gpu_that_is_left_alone(
    task: str, preset: str, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    estimate.tell_of_gpus(Plan(task, preset, "dense"))
    assert (
        capsys.readouterr().out.count("preset tiny leaves the GPU alone; small is for it (or GPUS=1)") == said
    )
