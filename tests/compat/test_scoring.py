"""Perplexity per word, and of the whole text."""

import math
import random
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import fairseq.tasks
import fairseq_cli.eval_lm
import numpy as np
import pytest
import torch
from commands import run
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from stock import LANGUAGE
from tolerances import about, printed

from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.scoring import refuse_long_blocks, score_every_block
from xmoe_fairseq_compat.words import Text, texts_of


def dictionary(text: str) -> Dictionary:
    symbols = Dictionary()
    for symbol in text.split():
        symbols.add_symbol(symbol)
    return symbols


SUBWORDS, SENTENCEPIECES = "lo@@ we@@ st new @@", "▁low est ▁ 中 ▁of▁the ▁new"


@pytest.mark.parametrize(
    ("kind", "symbols", "line", "words"),
    [
        ("subword_nmt", SUBWORDS, "lo@@ we@@ st new", ["lowest", "new", "</s>"]),
        ("@@ ", SUBWORDS, "new lo@@", ["new", "lo", "</s>"]),
        ("subword_nmt", SUBWORDS, "@@ st", ["st", "</s>"]),
        ("sentencepiece", SENTENCEPIECES, "▁low est ▁new", ["lowest", "new", "</s>"]),
        ("sentencepiece", SENTENCEPIECES, "▁ 中 est ▁ ▁ 中", ["中est", "中", "</s>"]),
        ("sentencepiece", SENTENCEPIECES, "est", ["est", "</s>"]),
        ("sentencepiece", SENTENCEPIECES, "▁low ☃ est", ["low<unk>est", "</s>"]),
        (None, SUBWORDS, "lo@@ we@@ st", ["lo@@", "we@@", "st", "</s>"]),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 100])
def test_words(kind: str | None, symbols: str, line: str, words: list[str], block: int) -> None:
    """Wherever a block cuts the text; the words are those of the decoded text."""
    known = dictionary(symbols)
    tokens = known.encode_line(line, add_if_not_exist=False).numpy()
    tokens = np.concatenate([tokens, tokens])  # two lines
    scores = -np.arange(1.0, 1 + len(tokens))
    cuts = range(0, len(tokens), block)
    text = Text(
        {i: (tokens[at : at + block], scores[at : at + block]) for i, at in enumerate(cuts)},
        texts_of(known, kind),
    )
    assert text.words == 2 * len(words)
    found = text.each_word()
    assert [word for _, word, _, _ in found] == words * 2
    assert sum(score for _, _, score, _ in found) == pytest.approx(scores.sum())


def test_a_word_does_not_reach_over_a_block_that_was_left_out() -> None:
    known = dictionary(SUBWORDS)
    half = known.encode_line("new lo@@", append_eos=False).numpy(), np.zeros(2)
    rest = known.encode_line("st").numpy(), np.zeros(2)
    texts = texts_of(known, "subword_nmt")
    assert Text({0: half, 1: rest}, texts).words == 3
    assert Text({0: half, 2: rest}, texts).words == 4


@pytest.mark.parametrize(
    ("kind", "symbols", "message"),
    [
        ("letter", SUBWORDS, "must be subword_nmt or sentencepiece for a perplexity per word, got letter"),
        ("sentencepiece", SUBWORDS, "no entry of the dictionary has ▁; give the right kind"),
        ("subword_nmt", SENTENCEPIECES, "no entry of the dictionary has @@"),
    ],
)
def test_words_that_cannot_be_told_are_refused(kind: str, symbols: str, message: str) -> None:
    with pytest.raises(FlagError, match=re.escape(message)):
        texts_of(dictionary(symbols), kind)


@pytest.mark.parametrize("bos", [False, True])
def test_eval_lm_counts_every_token(bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """--add-bos-token and an impossible token: neither an IndexError nor a score without it."""
    known = dictionary(SUBWORDS)
    tokens = known.encode_line("lo@@ st new").long()
    if bos:
        tokens = torch.cat([torch.tensor([known.bos()]), tokens])

    def score(*scores: float) -> dict[str, float]:
        hypothesis = {"tokens": tokens, "positional_scores": torch.tensor([-9.0] * bos + list(scores))}
        scorer = SimpleNamespace(generate=lambda models, sample: [[hypothesis]])
        monkeypatch.setattr(fairseq_cli.eval_lm, "SequenceScorer", lambda *_: scorer)
        return fairseq_cli.eval_lm.eval_lm(
            [torch.nn.Linear(1, 1)], known, [{"id": torch.tensor([0])}], "subword_nmt", remove_bos_token=bos
        )

    assert score(-1.0, -2.0, -3.0, -4.0)["loss"] == about(10 / 3 / math.log(2))
    assert score(-1.0, -math.inf, -3.0, -4.0)["perplexity"] == math.inf


def test_perplexity_per_word_of_a_command(tmp_path: Path) -> None:
    """Bits of all tokens over the words in the text (as tools/score.py has it), whatever the blocks cut."""
    rng = random.Random(3)
    words = ["▁a", "▁b", "▁a b", "▁ c b", "▁a b c"]
    lines = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(60)]
    (tmp_path / "text").write_text("\n".join(lines) + "\n")
    run(
        "fairseq-preprocess", "--only-source", "--trainpref", tmp_path / "text", "--testpref",
        tmp_path / "text", "--validpref", tmp_path / "text", "--destdir", tmp_path / "bin", "--workers", 1,
    )  # fmt: skip
    run("fairseq-train", tmp_path / "bin", *LANGUAGE, "--save-dir", tmp_path)
    score = ("fairseq-eval-lm", tmp_path / "bin", "--path", tmp_path / "checkpoint_last.pt", "--cpu")

    def loss(*flags: object) -> float:
        return float(
            re.findall(r"Loss \(base 2\): ([\d.]+)", run(*score, "--tokens-per-sample", 7, *flags))[0]
        )

    tokens = sum(len(line.split()) + 1 for line in lines)
    in_text = sum(len(line.replace(" ", "").replace("▁", " ").split()) + 1 for line in lines)
    assert loss("--remove-bpe", "sentencepiece") == printed(loss() * tokens / in_text, 3)


@pytest.mark.parametrize(("positions", "context", "most"), [(None, 0, 9), (9, 0, 9), (9, 4, 9), (13, 4, 13)])
def test_blocks_that_fit(positions: int | None, context: int, most: int) -> None:
    refuse_long_blocks(SimpleNamespace(sizes=[9, 3]), positions, context, most)


@pytest.mark.parametrize(("positions", "context", "most"), [(8, 0, 9), (9, 4, 13)])
def test_blocks_that_do_not_fit_are_refused(positions: int, context: int, most: int) -> None:
    with pytest.raises(
        FlagError, match="--tokens-per-sample must be at most the model's [89] positions: 1 of 2"
    ):
        refuse_long_blocks(SimpleNamespace(sizes=[9, 3]), positions, context, most)


def test_a_fragment_is_not_scored(corpus: tuple[Path, Path], stock_models: tuple[Path, Path]) -> None:
    score = (
        "fairseq-eval-lm", corpus[1], "--path", stock_models[1], "--cpu", "--tokens-per-sample", 64,
    )  # fmt: skip
    output = run(*score, succeeds=False).splitlines()[-1]
    assert "--tokens-per-sample must be at most the model's 32 positions: 1 of 2 blocks have more" in output
    output = run(*score, "--skip-invalid-size-inputs-valid-test")
    assert "1 of 2" in output.splitlines()[-1] and "left out of the score" in output.splitlines()[-1]


@pytest.mark.parametrize(("asked", "used"), [(1024, 32), (16, 16)])
def test_a_namespace_of_flags_is_a_configuration_too(
    asked: int, used: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As scripts call the command's main, and fairseq's own tests; a default of a flag is no choice."""
    saved = {"task": {"_name": "language_modeling", "tokens_per_sample": 32}}
    state = {"cfg": saved, "model": {}, "args": None, "extra_state": {}, "optimizer_history": [{}]}
    torch.save(state, tmp_path / "checkpoint.pt")
    flags = {"common_eval": {"path": str(tmp_path / "checkpoint.pt")}, "task": {"tokens_per_sample": asked}}
    convert = "fairseq.dataclass.utils.convert_namespace_to_omegaconf"
    monkeypatch.setattr(convert, lambda _: OmegaConf.create(flags))
    module = SimpleNamespace(main=lambda cfg: cfg, tasks=fairseq.tasks)
    score_every_block(module)
    assert module.main(Namespace()).task.tokens_per_sample == used
