"""The tools of claims.sh: rules on each other's models, kinds of tokens, how sure a difference in BLEU is."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import refusal
from parallel_runs import EXACT, LM, train
from sacrebleu.metrics import BLEU
from toy import language_model, sentences, task, translation_model, translation_sample

from experiments import compare_rules, significance, token_kinds
from experiments.grid import folder_name
from experiments.plan import Plan
from experiments.token_records import collect, frequencies
from xmoe_fairseq.moe import moe_layers
from xmoe_fairseq.moe.rules import RULES

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Few(list[Any]):
    """Batches."""

    number = None

    def __init__(self, *batches: Any) -> None:
        super().__init__(batches)
        self.task = task()


def text_sample(rows: int, length: int) -> dict[str, Any]:
    tokens = torch.randint(4, 40, (rows, length + 1))
    net_input = {"src_tokens": tokens[:, :-1], "src_lengths": torch.full((rows,), length)}
    return {"net_input": net_input, "target": tokens[:, 1:]}


def test_every_rule_at_the_same_number_of_experts() -> None:
    """And of all choices of so many the most probable pairs keep the most mass, by their definition."""
    model = language_model(moe_max_experts_per_token=0, moe_num_experts=16).eval()
    moe_layers(model)[0].router.weight.data.mul_(4)
    batches: Any = Few(text_sample(8, 30), text_sample(8, 30))
    for wanted in (1.5, 2, 3.25):
        found = dict(compare_rules.ways(model, batches, wanted))
        assert set(found) == {*RULES} | ({"top-k"} if wanted == 2 else set())
        assert [one.experts for one in found.values()] == pytest.approx([wanted] * len(found), abs=0.01)
        masses = {name: one.mass for name, one in found.items()}
        assert max(masses, key=lambda name: masses[name]) == "probability"
    (one,) = dict(compare_rules.ways(model, batches, 1)).values()  # all rules are the same
    assert one.experts == 1


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("further", [0, 0.25, 1, 3.5, 7])
def test_a_threshold_for_so_many_further_choices(rule: Any, further: float) -> None:
    p_TK = torch.randn(20, 8).mul(2).softmax(1).sort(dim=1, descending=True).values
    value_TK = rule.value(p_TK)
    threshold = compare_rules.threshold_for(rule, rule.level(value_TK)[:, 1:].numpy(), further)
    assert int(rule.takes(value_TK, threshold)[:, 1:].sum()) == 20 * further


@pytest.fixture(scope="module")
def runs(lm_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of top-k, and of a threshold with a budget."""
    folders = []
    for model, flags in (
        ("topk-s4", ("--moe-router", "topk", "--moe-topk", 2)),
        ("xmoe-s4-budget", ("--moe-threshold-rule", "mass", "--moe-target-experts-per-token", 2)),
    ):
        folder = tmp_path_factory.mktemp(model)
        train(1, lm_data / "bin", *LM, *EXACT, *flags, "--max-update", 3, "--save-dir", folder)
        (folder / "checkpoint_last.pt").rename(folder / "checkpoint_best.pt")
        about = {"task": "lm", "preset": "tiny", "model": model, "data": str(lm_data), "seed": 1, "flags": []}
        (folder / "run.json").write_text(json.dumps(about))
        folders.append(folder)
    return folders


def call(monkeypatch: pytest.MonkeyPatch, tool: Any, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
    tool.main()


def test_a_topk_model_by_thresholds(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, compare_rules, *runs, "--experts", 1.5, 2, "--out", tmp_path / "rules")
    topk, budget = (each["tested"] for each in json.loads((tmp_path / "rules.json").read_text()))
    as_it_is, by_thresholds = topk["as it is"]["as it is"], topk["2"]["top-k"]
    for what in ("experts", "bits", "mass"):  # another router, which chooses the same
        assert as_it_is[what] == pytest.approx(by_thresholds[what])
    assert set(budget["1.5"]) == {*RULES} and set(budget["2"]) == {"top-k", *RULES}
    assert all(len(budget["2"][name]["thresholds"]) == 1 for name in RULES)
    head, _, *rows = (tmp_path / "rules.md").read_text().splitlines()
    assert head == "| trained as | experts/token | as it is | top-k | mass | probability | relative |"
    assert [row.split(" | ")[1] for row in rows] == ["2.00", "1.5", "2", rows[3].split(" | ")[1], "1.5", "2"]
    assert re.fullmatch(r"\| topk-s4 \| 2.00 \| [\d.]+ \(0\.\d{3}\) \| - \| - \| - \| - \|", rows[0])
    words = (*runs, "--out", tmp_path / "rules", "--experts")
    message = f"--experts must be from 1 to 8, the experts of {runs[0]}, got 9"
    assert refusal(compare_rules.main, monkeypatch, *words, 9) == message


def test_kinds_of_tokens(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tokens"
    call(monkeypatch, token_kinds, runs[1], "--tokens", 200, "--out", out)
    (side,) = (found := json.loads(out.with_suffix(".json").read_text())).values()
    assert [*found] == ["decoder"] and side["layers"] == ["decoder layer 2"]
    names = ("frequency", "kind", "position", "own loss", "next loss")
    assert [*dict.fromkeys(row["property"] for row in side["groups"])] == [*names]
    totals = {name: sum(r["tokens"] for r in side["groups"] if r["property"] == name) for name in names}
    assert totals["kind"] == totals["frequency"] == totals["position"] == totals["next loss"] > 50
    assert totals["own loss"] < totals["next loss"]  # of a block's first piece nothing is predicted
    means = {sum(r["tokens"] * r["mean"][0] for r in side["groups"] if r["property"] == name) / totals[name]
             for name in names if name != "own loss"}  # fmt: skip
    assert max(means) == pytest.approx(min(means))
    text = out.with_suffix(".md").read_text()
    assert text.startswith("## decoder\n\n| property | group | tokens, % | decoder layer 2 |\n")
    assert "| property | variance explained, decoder layer 2 | rank correlation, decoder layer 2 |" in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    message = refusal(token_kinds.main, monkeypatch, *runs, "--out", out)
    assert message == "RUNs must be of one model, and differ in the seed, got topk-s4; xmoe-s4-budget"
    message = refusal(token_kinds.main, monkeypatch, runs[0], "--tokens", "200", "--out", out)
    assert "all tokens take 2 experts in each layer of the decoder" in message


def test_tokens_of_a_translation() -> None:
    """Padding on either side takes no part; a piece's own loss is what its predecessor had to predict."""
    model = translation_model(moe_router="topk", moe_topk=2, encoder_layers=2).eval()
    source, target = sentences([3, 6], left_pad=True), sentences([5, 2])
    sample, both = translation_sample(source, target), task()
    found = collect(model, both, Few(sample), lambda _, size: np.arange(size))  # type: ignore[arg-type]
    encoder, decoder = found["encoder"], found["decoder"]
    assert sorted(encoder.position_N) == sorted([*range(3), *range(6)]) and np.isnan(encoder.next_N).all()
    assert sorted(decoder.position_N) == [0, 0, 1, 1, 2, 3, 4] and not np.isnan(decoder.next_N).any()
    assert (encoder.experts_NL == 2).all() and encoder.experts_NL.shape == (9, 1)
    assert (encoder.frequency_N == encoder.id_N).all()
    with torch.no_grad():
        logits = model(**sample["net_input"])[0]
    bits = -logits.log_softmax(-1)[0, range(5), target[0]] / math.log(2)
    first = [i for i, position in enumerate(decoder.position_N) if position > 1]  # of the longer one alone
    assert decoder.next_N[first] == pytest.approx(bits[2:].numpy(), abs=1e-4)
    assert decoder.own_N[first] == pytest.approx(bits[1:-1].numpy(), abs=1e-4)


def test_frequencies_are_of_the_training_text(corpus: tuple[Path, Path]) -> None:
    from fairseq.data import Dictionary

    names = Dictionary.load(str(corpus[1] / "dict.txt"))
    of_lm = frequencies(SimpleNamespace(data=str(corpus[1])), "decoder", len(names))
    words = (corpus[1].parent / "train.en").read_text().split()
    assert all(of_lm[names.index(word)] == words.count(word) for word in {*words})


def test_kinds_ranks_and_shares() -> None:
    pieces = ["▁The", "ing", "▁3.", "▁(", ".", "</s>", "<0x0A>", "▁"]
    kinds = [token_kinds.KINDS[token_kinds.kind(piece)] for piece in pieces]
    assert kinds == ["first piece", "further piece", "digit", *["punctuation"] * 2, *["other"] * 3]
    assert token_kinds.ranks(np.array([3.0, 1, 3, 7])).tolist() == [2.5, 1, 2.5, 4]
    rising, with_gaps = np.array([1.0, 2, 3, 4]), np.array([math.nan, 10, 100, 1000])
    assert token_kinds.rank_correlation(rising, with_gaps) == pytest.approx(1)
    assert token_kinds.rank_correlation(-rising, with_gaps) == pytest.approx(-1)
    assert math.isnan(token_kinds.rank_correlation(rising, np.ones(4)))
    group = np.repeat([0, 1], 500)
    assert token_kinds.explained(group * 2.0, group) == 1
    noise = np.random.default_rng(1).normal(size=1000)
    assert abs(token_kinds.explained(noise, np.arange(1000) // 4)) < 0.1  # 0.25 unless adjusted
    labels, quarter = token_kinds.quantiles(np.array([math.nan, 1, 2, 3, 4, 5, 6, 7, 8]), 4)
    assert quarter.tolist() == [-1, 0, 0, 1, 1, 2, 2, 3, 3] and len(labels) == 4


def test_how_sure_a_difference_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same seed; what is the reference is surely better than what has other words."""
    (tmp_path / "data/bin").mkdir(parents=True)
    (tmp_path / "data/bin/train.en-de.en.idx").touch()
    (tmp_path / "data/text").mkdir()
    text = [f"das ist der {i} . Satz von {i * i} , und er ist lang" for i in range(40)]
    (tmp_path / "data/text/test.de").write_text("\n".join(text) + "\n")
    runs, changed = [], {"dense-1": "und", "dense-2": "ist", "switch-1": "-", "switch-3": "-"}
    for name, change in changed.items():
        model, seed = name.split("-")
        run = tmp_path / name
        (run / "score.best").mkdir(parents=True)
        about = {"task": "wmt", "preset": "tiny", "model": model, "seed": int(seed), "flags": []}
        (run / "run.json").write_text(json.dumps(about | {"data": str(tmp_path / "data")}))
        lines = [f"D-{i}\t-0.5\t{line.replace(change, 'oder')}" for i, line in enumerate(text)]
        (run / "score.best/test.out").write_text("\n".join(reversed(lines)))
        runs.append(run)
    words = (*runs, "--against", "dense", "--samples", 50, "--out", tmp_path / "sure")
    call(monkeypatch, significance, *words)
    first, switch, second = json.loads((tmp_path / "sure.json").read_text())
    assert [(one["model"], one["seed"]) for one in (first, switch, second)] == [
        ("dense", 1), ("switch", 1), ("dense", 2),
    ]  # fmt: skip
    score = BLEU().corpus_score([line.replace("und", "oder") for line in text], [text]).score
    assert first["bleu"]["score"] == pytest.approx(score) and first["bleu"]["p"] is None
    assert switch["bleu"]["difference"] == pytest.approx(100 - score) and switch["chrf++"]["difference"] > 0
    assert switch["bleu"]["p"] < 0.05
    rows = (tmp_path / "sure.md").read_text().splitlines()
    assert rows[0] == "| model | seed | BLEU | difference | p | chrF++ | difference | p |"
    assert rows[2].split(" | ")[3:5] == ["-", "-"] and rows[3].split(" | ")[3] == f"{100 - score:+.2f}"
    (runs[2] / "score.best/test.out").write_text("D-0\t-0.5\tdas\n")
    message = refusal(significance.main, monkeypatch, *words)
    assert "test.out: holds 1 translations of 40; score the run again" in message


def beginning(task: str) -> str:
    """Of claims.sh: what it is going to do, and no more."""
    text = (SCRIPTS / "claims.sh").read_text().split("VOCAB_SIZE=")[0]
    return f"set -- {task}\n" + text.replace('"$(dirname "${BASH_SOURCE[0]}")', f'"{SCRIPTS}')


def printed(script: str, **env: str) -> list[str]:
    env |= {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name, task", [("lm", "lm"), ("mt", "wmt")])
def test_the_grid_can_be_trained_and_its_runs_are_found(name: str, task: str, tmp_path: Path) -> None:
    models = printed(beginning(name) + 'printf "%s\\n" "${models[@]}" "${once[@]}"')
    assert models[0] == "dense" and len({*models}) == len(models) >= 7
    for model in models:
        words = shlex.split(model)
        given = Plan(task, "claims", words[0]).flags(words[1:])
        assert given.count("--moe-threshold") + given.count("--moe-target-experts-per-token") <= 1
        run = tmp_path / folder_name(model, 2)
        run.mkdir()
        (run / "scores.best.json").touch()
    for model in models:
        script = beginning(name) + f'runs_of "{model}"; printf "%s\\n" "${{found[@]}}"'
        assert printed(script, OUT=str(tmp_path)) == [str(tmp_path / folder_name(model, 2))]
