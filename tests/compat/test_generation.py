"""One test per patch of fairseq's generation, which fails where the patch is taken away."""

import logging
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.dataclass.configs import GenerationConfig
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask
from tolerances import assert_same
from torch import Tensor
from toy import EOS, PAD, dictionary, sentences, translation_model

from xmoe_fairseq_compat import registry
from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.generation import check_flags_of_generation, check_generation


@pytest.mark.parametrize(
    ("n", "tokens", "banned"),
    [
        (2, [2, 5, 6, 5], [6]),  # after 5 came 6
        (1, [2, 5, 6, 5], [5, 6]),  # EOS, which every sentence begins with, may end it
        (3, [2, 5, 6, 7, 5, 6], [7]),
        (3, [2, 5, 6, 7, 5], []),
        (2, [2], []),
        (4, [2, 5], []),
        (2, [2, 5, 5], [5]),
    ],
)
def test_repeated_ngrams_are_banned(n: int, tokens: list[int], banned: list[int]) -> None:
    step = len(tokens) - 1
    padded = torch.tensor([[*tokens, 1, 1, 1], [2, 3, 4, 3, 4, 3, 4, 3, 4][: len(tokens) + 3]])
    for block in (NGramRepeatBlock(n), torch.jit.script(NGramRepeatBlock(n))):
        scores = block(padded, torch.zeros(2, 8), 1, 2, step)
        assert torch.where(scores[0].isinf())[0].tolist() == banned


def test_a_forced_token_is_not_banned() -> None:
    """As --prefix-size forces it: all others are -inf."""
    forced = torch.full((1, 8), float("-inf"))
    forced[0, 6] = -3.0
    scores = NGramRepeatBlock(2)(torch.tensor([[2, 5, 6, 5, 1]]), forced.clone(), 1, 1, 3)
    assert torch.equal(scores, forced)


def source_inputs(source: Tensor) -> dict[str, Tensor]:
    return {"src_tokens": source, "src_lengths": source.ne(PAD).sum(dim=1)}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_translations_repeat_no_ngram(n: int) -> None:
    model = translation_model(vocab_size=12).eval()
    generator = SequenceGenerator([model], dictionary(12), beam_size=3, max_len_b=8, no_repeat_ngram_size=n)
    sample = {"net_input": source_inputs(sentences([4, 6], vocab_size=12, left_pad=True))}
    for hypothesis in (h for hypotheses in generator.generate([model], sample) for h in hypotheses):
        words = hypothesis["tokens"].tolist()[:-1]
        grams = [tuple(words[i : i + n]) for i in range(len(words) + 1 - n)]
        assert len(grams) == len(set(grams)), words


class Task(FairseqTask):
    source_dictionary = target_dictionary = dictionary(14)


def test_translations_are_as_long_as_their_sources_and_their_ends_count() -> None:
    model, lengths = translation_model(vocab_size=14).eval(), [4, 7, 1, 3]  # one is empty
    source = sentences(lengths, vocab_size=14, left_pad=True)
    args = Namespace(match_source_len=True, beam=3)
    generator = Task(Namespace()).build_generator([model], args)
    hypotheses = generator.generate([model], {"net_input": source_inputs(source)})
    for row, length in enumerate(lengths):
        assert len(hypotheses[row][0]["tokens"]) == length
        if length == 1:  # the others are longer, and scored -inf
            continue
        assert {len(h["tokens"]) for h in hypotheses[row]} == {length}
        tokens, alone = hypotheses[row][0]["tokens"], source[row : row + 1, -length:]
        previous = torch.cat([torch.tensor([EOS]), tokens[:-1]]).unsqueeze(0)
        with torch.no_grad():
            logits = model(**source_inputs(alone), prev_output_tokens=previous)[0]
        expected = logits.log_softmax(-1)[0].gather(1, tokens.unsqueeze(1)).squeeze(1)
        assert_same(hypotheses[row][0]["positional_scores"], expected)


def test_the_source_length_counts_more_than_the_least_length() -> None:
    model, lengths = translation_model(vocab_size=14).eval(), [3, 8]
    generator = Task(Namespace()).build_generator(
        [model], Namespace(match_source_len=True, beam=2, min_len=4)
    )
    source = sentences(lengths, vocab_size=14, left_pad=True)
    found = generator.generate([model], {"net_input": source_inputs(source)})
    assert [[len(h["tokens"]) for h in hypotheses] for hypotheses in found] == [[3, 3], [8, 8]]


@pytest.mark.parametrize("flags", [{}, {"sampling": True, "sampling_topk": 1, "nbest": 3}])
def test_the_length_of_a_translation_depends_on_its_own_source(flags: dict[str, Any]) -> None:
    torch.manual_seed(3)
    model, lengths = translation_model(vocab_size=14).eval(), [4, 12, 7]
    source = sentences(lengths, vocab_size=14, left_pad=True)
    args = Namespace(beam=3, max_len_a=0.5, max_len_b=1, unnormalized=True, lenpen=1, min_len=2, **flags)
    generator = Task(Namespace()).build_generator([model], args)
    together = generator.generate(
        [model], {"net_input": source_inputs(source), "id": torch.tensor([7, 5, 9])}
    )
    for row, length in enumerate(lengths):
        (alone,) = generator.generate([model], {"net_input": source_inputs(source[row : row + 1, -length:])})
        for one, other in zip(alone, together[row], strict=True):
            assert one["tokens"].tolist() == other["tokens"].tolist()
            assert len(one["tokens"]) <= length // 2 + 2


def test_constraints_may_take_the_room_of_the_batch() -> None:
    """Three words that must come, where the source alone would leave room for two."""
    source = sentences([3, 9], vocab_size=14, left_pad=True)
    sample = {"net_input": source_inputs(source)}
    model = translation_model(vocab_size=14).eval()
    args = Namespace(beam=4, max_len_a=1, max_len_b=-1, constraints="ordered")
    generator = Task(Namespace()).build_generator([model], args)
    forced = torch.tensor([[3, 5, 0, 6, 0, 7, 0], [0] * 7])
    (best, *_), _ = generator.generate([model], sample, constraints=forced)
    assert [token for token in best["tokens"].tolist() if token in (5, 6, 7)][:3] == [5, 6, 7]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sampling": True}, "--nbest must be --beam 5 with --sampling, got 1"),
        ({"retain_dropout_modules": "A"}, "--retain-dropout-modules needs --retain-dropout, got A"),
        ({"sampling_topk": 3}, "--sampling-topk needs --sampling, got 3"),
        ({"sampling_topp": 0.5}, "--sampling-topp needs --sampling, got 0.5"),
        ({"min_len": 300}, "--min-len must be at most --max-len-b 200, got 300"),
        (
            {"constraints": "ordered", "diversity_rate": 0.0},
            "--diversity-rate and --constraints are searches",
        ),
        ({"sampling": True, "nbest": 5, "match_source_len": True}, "--sampling and --match-source-len are"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_flags_of_a_search_that_do_not_fit(flags: dict[str, Any], message: str) -> None:
    check_generation(GenerationConfig())
    with pytest.raises(FlagError, match=f"^{message}"):
        check_generation(GenerationConfig(**flags))


@pytest.mark.parametrize("name", ["print_step", "retain_iter_history"])
def test_a_beam_search_has_no_steps_to_print(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(FlagError, match=f"^{flag} needs a model that refines its output"):
        FairseqTask(Namespace()).build_generator([], Namespace(**{name: True}))


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("generate", {"constraints": "ordered"}, "--constraints is read by fairseq-interactive alone"),
        ("generate", {"lm_path": "lm.pt"}, "--lm-path needs --lm-weight, what its scores count, got 0.0"),
        ("generate", {"min_len": 300}, "--min-len must be at most --max-len-b 200, got 300"),
        ("interactive", {"sampling": True}, "--nbest must be --beam 5 with --sampling, got 1"),
        ("interactive", {"score_reference": True}, "--score-reference is read by fairseq-generate alone"),
        ("interactive", {"lm_path": "lm.pt"}, "--lm-path is read by fairseq-generate alone"),
        ("interactive", {"print_alignment": "soft"}, "--print-alignment soft is read by fairseq-generate"),
    ],
)
def test_flags_that_a_command_would_pass_over(command: str, flags: dict[str, Any], message: str) -> None:
    module = SimpleNamespace(__name__=f"fairseq_cli.{command}", main=lambda cfg: "ran")
    assert check_flags_of_generation in [patch for _, patch in registry.after[module.__name__]]
    check_flags_of_generation(module)
    assert module.main(SimpleNamespace(generation=GenerationConfig())) == "ran"
    with pytest.raises(FlagError, match=f"^{message}"):
        module.main(SimpleNamespace(generation=GenerationConfig(**flags)))


def test_a_prefix_of_no_reference_is_told(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("fairseq_cli.interactive")
    module = SimpleNamespace(__name__="fairseq_cli.interactive", main=lambda cfg: "ran", logger=logger)
    check_flags_of_generation(module)
    assert module.main(SimpleNamespace(generation=GenerationConfig(prefix_size=1))) == "ran"
    assert "--prefix-size is read by fairseq-generate alone: nothing is forced" in caplog.text


def test_the_names_of_fairseqs_examples_are_dropout_to_retain() -> None:
    """As its examples write them."""
    model = translation_model(moe_freq=0)
    text = '["TransformerModel", "TransformerEncoder", "TransformerEncoderLayer"]'
    model.make_generation_fast_(retain_dropout=True, retain_dropout_modules=text)
    assert model.encoder.dropout_module.apply_during_inference
    assert model.encoder.layers[0].dropout_module.apply_during_inference
    assert not model.decoder.layers[0].dropout_module.apply_during_inference
