"""What is said of each token is what the layers did with it."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
import toy
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from tolerances import assert_same
from torch import Tensor

from xmoe_fairseq.explain.collect import Choice, Layer, Records, choices_of, cost
from xmoe_fairseq.explain.pieces import in_words, printable
from xmoe_fairseq.explain.sentences import of_set, of_text
from xmoe_fairseq.moe import CheapExperts, MoELayer, Routing, TokenRouter, moe_layers, record_routing
from xmoe_fairseq.moe.routers.registry import registered_routers
from xmoe_fairseq_compat.errors import FlagError, UserError

PIECES = 99
CHEAP = {"moe_zero_experts": 1, "moe_copy_experts": 1, "moe_constant_experts": 1}


def batch(*lengths: int) -> dict[str, Any]:
    """Sources are padded on the left, and come in another order than their ids."""
    source, target = toy.sentences([*lengths], left_pad=True), toy.sentences([*reversed(lengths)])
    ids = torch.arange(len(lengths)).flip(0)
    return {**toy.translation_sample(source, target), "id": ids}


def dictionaries() -> dict[str, Dictionary]:
    return dict.fromkeys(("encoder", "decoder"), toy.dictionary(40))


def by_sentence(weights_TE: Tensor, ids_BL: Tensor) -> list[list[Tensor]]:
    """Of each sentence each token's: an MoE layer gets all sentences' first places, then the second ones."""
    found, rows = [[] for _ in ids_BL], iter(weights_TE)
    for place in range(ids_BL.size(1)):
        for sentence, ids_L in enumerate(ids_BL):
            if ids_L[place] != toy.PAD:
                found[sentence].append(next(rows))
    return found


OURS = [name for name, kind in registered_routers().items() if kind.__module__.startswith("xmoe_fairseq.")]


@pytest.mark.parametrize("name", [*OURS, "cheap", "shared", "capacity"])
def test_choices_are_what_the_layers_weigh_by(name: str) -> None:
    more: dict[str, Any] = {"moe_router": name}
    if name not in registered_routers():
        settings = {"cheap": CHEAP, "shared": {"moe_shared_experts": 1}}
        more = settings.get(name, {"moe_eval_capacity_factor": 0.5, "moe_min_capacity": 1})
    elif not registered_routers()[name].is_causal:
        more["no_moe_decoder"] = True
    model, sample = toy.translation_model(**more).eval(), batch(5, 3, 7)
    torch.manual_seed(3)  # gshard draws the second expert
    with record_routing(model) as routed, torch.no_grad():
        model(**sample["net_input"])
    torch.manual_seed(3)
    records = Records(model)
    sentences = records.sentences(sample, dictionaries(), PIECES)
    read = {"encoder": "src_tokens", "decoder": "prev_output_tokens"}
    for number, (layer, routing) in enumerate(routed):
        ids_BL = sample["net_input"][read[layer.side]]
        expected = by_sentence(routing.combine_weights(), ids_BL)
        probs = by_sentence(routing.probs_TE, ids_BL)
        for one, sentence in enumerate(sentences):
            row, found = sample["id"].tolist().index(one), sentence.choices[number]
            assert len(found) == len(expected[row]) == len(sentence.pieces[layer.side])
            for choices, weights_E, probs_E in zip(found, expected[row], probs[row], strict=True):
                mine = torch.zeros_like(probs_E)
                for choice in choices:
                    mine[choice.expert] = choice.weight
                    assert choice.probability == probs_E[choice.expert]
                assert_same(mine[: len(weights_E)], weights_E)
                falling = [c.probability for c in choices]
                assert falling == sorted(falling, reverse=True)


class Given(TokenRouter):
    """The experts of each token are given; their weights are 1 and a half."""

    def __init__(self, *experts: list[int]) -> None:
        super().__init__(8, 5, 0)
        self.pairs = [(token, expert) for token, own in enumerate(experts) for expert in own]

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Routing:
        token_R, expert_R = torch.tensor(self.pairs).unbind(1)
        none, weight_R = partial(x_TD.new_zeros, ()), torch.full((len(self.pairs),), 1.5)
        probs_TE = torch.arange(5.0).expand(x_TD.size(0), 5) / 10
        return Routing(token_R, expert_R, token_R * 0, weight_R, probs_TE, len(self.pairs), none, none)


def test_cheap_experts_are_named_and_compute_nothing() -> None:
    layer = MoELayer(
        8, 4, 3, Given([0, 4, 2], [], [3, 4]), cheap=CheapExperts(8, zero=1, constant=1), shared_experts=2,
        name="decoder.layers.1", side="decoder",
    )  # fmt: skip

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, src_tokens: Tensor) -> None:
            self.layer(torch.ones(3, 8))

    records, sample = Records(Model()), {"net_input": {"src_tokens": torch.ones(1, 3)}}
    for _ in range(2):
        records.count(sample)
    (totals,) = records.totals()
    assert totals.name == "decoder layer 2" and totals.experts == ["0", "1", "2", "zero 0", "constant 0"]
    assert (totals.rows, totals.dead, totals.tokens, totals.shared) == ([2, 0, 2, 2, 4], ["1"], 6, 2)
    choices = choices_of(*records.run(sample)[0])
    assert choices[0] == [
        Choice(4, pytest.approx(0.4), 1.5),
        Choice(2, pytest.approx(0.2), 1.5),
        Choice(0, 0, 1.5),
    ]
    assert [totals.computing(each) for each in choices] == [4, 2, 2]
    assert cost([totals])[0] == pytest.approx((2 + 6) / 3)
    assert max(totals.loads) == 5 * 4 / 10


def test_loads_are_those_of_all_tokens() -> None:
    model, samples = toy.translation_model(**CHEAP).eval(), [batch(5, 3), batch(4, 9)]
    records = Records(model)
    sentences = [one for each in samples for one in records.sentences(each, dictionaries(), PIECES)]
    for sample in samples:
        records.count(sample)
    for number, layer in enumerate(records.totals()):
        choices = [of for sentence in sentences for of in sentence.choices[number]]
        taken = [choice.expert for of in choices for choice in of]
        assert layer.rows == [taken.count(expert) for expert in range(len(layer.experts))]
        assert layer.tokens == len(choices) == 21
        assert layer.computed == sum(map(layer.computing, choices))


def test_experts_that_are_not_in_use_are_not_dead() -> None:
    model = toy.translation_model(moe_router="topany", moe_initial_experts=3, moe_adapt_experts_every=9)
    records = Records(model.eval())
    records.count(batch(5, 3))
    for layer in records.totals():
        used = [str(e) for e in moe_layers(model)[0].router.pool.active_E.nonzero().flatten().tolist()]
        assert len(used) == 3 and set(layer.unused) == {*layer.experts} - {*used}
        assert set(layer.dead) <= {*used} and max(layer.loads) == 3 * max(layer.rows) / sum(layer.rows)


def test_a_language_model_has_one_side_and_long_blocks_are_cut() -> None:
    model = toy.language_model().eval()
    sample = {**toy.language_sample(toy.sentences([9, 4])), "id": torch.arange(2)}
    first, second = Records(model).sentences(sample, dictionaries(), 6)
    assert list(first.pieces) == ["decoder"] and first.pieces["decoder"][0] == "</s>"
    assert [len(of) for of in (*first.choices, *second.choices)] == [6, 4]
    assert len(first.pieces["decoder"]) == 6


def test_pieces_as_a_person_reads_them() -> None:
    assert in_words(["▁Mo", "tion", "▁sensor", "</s>"]) == "Motion sensor"
    assert in_words(["</s>", "w1", "w2"]) == "w1 w2"
    assert printable("a\x1b[2J\u202eb\u200d ♥") == r"a\x1b[2J\u202eb" + "\u200d ♥"
    assert printable("\udce9\u2028") == r"\udce9\u2028"


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with spm.model, and the dictionary of its pieces."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text").write_text("the cat sat on the mat\na dog ran to the cat\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spm"), vocab_size=30, hard_vocab_limit=False,
        bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    processor, dictionary = sentencepiece.SentencePieceProcessor(str(folder / "spm.model")), Dictionary()
    for number in range(1, len(processor)):
        dictionary.add_symbol(processor.id_to_piece(number))
    return SimpleNamespace(folder=folder, dictionary=dictionary, processor=processor)


def test_text_for_a_translation_model(spm: Any) -> None:
    """The decoder reads what the model translates it to."""
    task = TranslationTask(TranslationConfig(), spm.dictionary, spm.dictionary)
    model = toy.translation_model(len(spm.dictionary), max_source_positions=20).eval()
    cfg = SimpleNamespace(generation=SimpleNamespace(beam=2, max_len_b=5))
    (spm.folder / "bin").mkdir()
    texts = ["the  cat sat", "a mat"]
    sample = of_text(model, task, cfg, texts, None, spm.folder / "bin")
    both = dict.fromkeys(("encoder", "decoder"), spm.dictionary)
    sentences = Records(model).sentences(sample, both, PIECES)
    assert [each.title for each in sentences] == ["the cat sat", "a mat"]
    assert all(each.pieces["decoder"][0] == "</s>" for each in sentences)
    alone = of_text(model, task, cfg, texts[1:], None, spm.folder)
    assert Records(model).sentences(alone, both, PIECES)[0].pieces == sentences[1].pieces
    generator = task.build_generator([model], cfg.generation)
    best = generator.generate(
        [model], {"net_input": {k: v for k, v in alone["net_input"].items() if k[:3] == "src"}}
    )
    read = [spm.dictionary[i] for i in best[0][0]["tokens"][:-1]]
    assert sentences[1].pieces["decoder"] == ["</s>", *read]


def test_text_for_a_language_model_and_what_is_refused(spm: Any) -> None:
    task = SimpleNamespace(source_dictionary=spm.dictionary)
    cfg = SimpleNamespace(task=SimpleNamespace(add_bos_token=False))
    model = toy.language_model(len(spm.dictionary)).eval()
    read = partial(of_text, model, task, cfg)
    ids = read(["the cat", "on the mat"], spm.folder / "spm.model", spm.folder / "none")["net_input"][
        "src_tokens"
    ]
    assert ids[:, 0].tolist() == [toy.EOS] * 2
    assert spm.processor.decode([spm.dictionary[i] for i in ids[1, 1:].tolist()]) == "on the mat"
    (spm.folder / "no.model").touch()
    bad = [
        (["the", " \n"], None, "--text must hold a word, got nothing"),
        (["\udce9"], None, "--text must be Unicode text, got '\\udce9'"),
        (
            ["Ж"],
            None,
            "the dictionary does not know 1 of its 2 pieces (Ж); is --sentencepiece-model of other",
        ),
        (["the " * 99], None, "--text: the model reads 63 pieces at most, and it has "),
        (["the"], spm.folder / "none.model", "none.model: no such file"),
        (["the"], spm.folder / "no.model", "no.model: not a sentencepiece model"),
    ]
    for texts, file, message in bad:
        with pytest.raises(UserError) as error:
            read(texts, file, spm.folder)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FlagError, match="and there is no spm.model: name it with --sentencepiece-model"):
        read(["the"], None, spm.folder / "bin" / "deeper")


def test_sentences_are_spread_over_the_set() -> None:
    class Numbers(list[int]):
        collater = staticmethod(list)

    task = SimpleNamespace(dataset=lambda split: Numbers(range(10)), max_positions=lambda: None)
    assert of_set(task, "valid", 2) == [2, 7] and of_set(task, "valid", 99) == [*range(10)]
    task.max_positions = lambda: 3
    task.filter_indices_by_size = lambda ids, *_, **__: ids[:0]
    with pytest.raises(UserError, match="'valid': the sentences are longer than the model reads; take more"):
        of_set(task, "valid", 2)


def test_layers_of_no_tokens_cost_nothing() -> None:
    assert cost([Layer("l", "encoder", ["0"], 1, [], 0, [0], 0, 0, 0.0, 0.0, {})]) == (0.0, 0.0)
