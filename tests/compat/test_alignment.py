"""One test per patch of alignments and of --replace-unk, which fails where the patch is taken away."""

from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import utils
from fairseq.data import BaseWrapperDataset
from fairseq.sequence_generator import SequenceGeneratorWithAlignment
from fairseq.tasks import FairseqTask
from toy import PAD, dictionary, language_model, sentences, translation_model

from xmoe_fairseq_compat import registry
from xmoe_fairseq_compat.alignment import Alignment, check_what_words_are_replaced_by
from xmoe_fairseq_compat.errors import FlagError, UserError


class Task(FairseqTask):
    source_dictionary = target_dictionary = dictionary(14)


def aligned(model: Any, **flags: Any) -> list[list[dict[str, Any]]]:
    source = sentences([4, 7, 3], vocab_size=len(Task.source_dictionary), left_pad=True)
    sample = {"net_input": {"src_tokens": source, "src_lengths": source.ne(PAD).sum(dim=1)}}
    generator = Task(Namespace()).build_generator([model], Namespace(**flags))
    hypotheses: list[list[dict[str, Any]]] = generator.generate([model], sample)
    return hypotheses


@pytest.mark.parametrize(
    "flags", [{"print_alignment": True}, {"print_alignment": "hard"}, {"replace_unk": ""}]
)
def test_each_word_is_aligned_to_the_source_word_it_looked_at(flags: dict[str, Any]) -> None:
    model = translation_model(vocab_size=14).eval()
    for length, hypotheses in zip([4, 7, 3], aligned(model, beam=2, max_len_b=6, **flags), strict=True):
        assert len(hypotheses) == 2
        for hypothesis in hypotheses:
            words = hypothesis["attention"][-length:-1, : len(hypothesis["tokens"]) - 1]  # without EOS
            expected = [(place, word) for word, place in enumerate(words.argmax(dim=0).tolist())]
            assert hypothesis["alignment"] == expected
            assert hypothesis["alignment"].source_length == length - 1


def test_less_hypotheses_than_the_beam_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 words neither padding nor an end can be the first: 6 hypotheses of one word."""
    monkeypatch.setattr(Task, "target_dictionary", dictionary(8))
    monkeypatch.setattr(Task, "source_dictionary", dictionary(8))
    model = translation_model(vocab_size=8).eval()
    for hypotheses in aligned(model, beam=7, max_len_b=1, print_alignment="hard"):
        assert len(hypotheses) == 6
        assert all(len(hypothesis["alignment"]) == 1 for hypothesis in hypotheses)


def test_what_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(FlagError, match="^--print-alignment must be hard or soft, got best$"):
        SequenceGeneratorWithAlignment([translation_model()], dictionary(40), print_alignment="best")
    with pytest.raises(FlagError, match="need a model with an encoder$"):
        SequenceGeneratorWithAlignment([language_model()], dictionary(40))
    for flags in ({"score_reference": True}, {"print_alignment": "soft"}):
        (name,) = flags
        with pytest.raises(FlagError, match=f"cannot be combined with --{name.replace('_', '-')}"):
            Task(Namespace()).build_generator([], Namespace(replace_unk="", **flags))


def test_alignment_dictionaries(tmp_path: Path) -> None:
    file = tmp_path / "words"
    file.write_text("ein a\nHaus house\n")
    assert utils.load_align_dict(str(file)) == {"ein": "a", "Haus": "house"}
    assert utils.load_align_dict("@@ ") == utils.load_align_dict("") == {}  # --replace-unk without a value
    assert utils.load_align_dict(None) is None
    file.write_text("ein a\nHaus\n")
    with pytest.raises(UserError, match="words: line 2 must hold a word and its translation"):
        utils.load_align_dict(str(file))
    with pytest.raises(UserError, match="^--replace-unk /no/such: .*No such file"):
        utils.load_align_dict("/no/such")


def test_unknown_words_are_replaced_by_aligned_source_words() -> None:
    """Also between pieces, behind a language's token on each side, and from an unknown source word."""
    symbols = dictionary(8)  # the last four: symbol0, ...
    pieces, language = symbols.add_symbol("pie@@"), symbols.add_symbol("__en__")
    tokens = torch.tensor([language, pieces, symbols.unk(), 4, symbols.unk(), symbols.unk(), symbols.eos()])
    alignment = Alignment([(2, 1), (1, 2), (1, 3), (2, 4), (0, 5)])  # of __de__ first second
    alignment.source_length = 3
    replaced = utils.post_process_prediction(
        tokens, "first second", alignment, {"second": "zweites"}, symbols, "@@ ", {language}
    )
    assert replaced[1] == "piefirst symbol0 zweites <unk>"
    assert symbols.string(replaced[0]) == "piefirst symbol0 zweites <unk>"
    alignment.written = ["erstes", "second"]
    replaced = utils.post_process_prediction(tokens, "<unk> second", alignment, {}, symbols, None, {language})
    assert replaced[1] == "pie@@ erstes symbol0 second <unk>"


def test_source_words_reach_the_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    interactive = import_module("fairseq_cli.interactive")
    monkeypatch.setattr(SequenceGeneratorWithAlignment, "written", None)
    batches = iter([[2, 0], [1]])

    class Inference(FairseqTask):
        def get_interactive_tokens_and_lengths(self, lines: Any, encode: Any) -> Any:
            return [], []

        def build_dataset_for_inference(self, *_: Any, **__: Any) -> Any:
            return None

        def get_batch_iterator(self, *_: Any, **__: Any) -> Any:
            empty = {"src_tokens": None, "src_lengths": None}
            made = [{"id": torch.tensor(ids), "net_input": empty} for ids in batches]
            return SimpleNamespace(next_epoch_itr=lambda shuffle: made)

    cfg = SimpleNamespace(
        generation=SimpleNamespace(constraints=None),
        dataset=SimpleNamespace(max_tokens=1, batch_size=2, skip_invalid_size_inputs_valid_test=False),
    )
    seen = [
        SequenceGeneratorWithAlignment.written
        for _ in interactive.make_batches(["a b", "c", "d e"], cfg, Inference(Namespace()), None, str.upper)
    ]
    assert seen == [[["D", "E"], ["A", "B"]], [["C"]]]
    assert SequenceGeneratorWithAlignment.written is None  # nothing for what this process translates next


def test_a_wrapped_data_set_gives_the_text_as_it_was_written() -> None:
    raw = SimpleNamespace(get_original_text=["a b", "c"].__getitem__)
    assert BaseWrapperDataset(raw).get_original_text(1) == "c"


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("interactive", {"bpe": "subword_nmt"}, "--replace-unk cannot be combined with --bpe"),
        ("interactive", {"tokenizer": "moses"}, "--replace-unk cannot be combined with --tokenizer"),
        ("interactive", {"post_process": "@@ "}, "--replace-unk cannot be combined with --post-process"),
        ("generate", {"bpe": "subword_nmt"}, "--replace-unk cannot be combined with --bpe"),
        ("generate", {"dataset_impl": None}, "--replace-unk needs the words as they were written: binarise"),
    ],
)
def test_words_are_replaced_not_pieces(command: str, flags: dict[str, Any], message: str) -> None:
    given = {"bpe": None, "tokenizer": None, "post_process": None, "dataset_impl": "raw"}
    module = SimpleNamespace(__name__=f"fairseq_cli.{command}", main=lambda cfg: "ran")
    assert check_what_words_are_replaced_by in [patch for _, patch in registry.after[module.__name__]]
    check_what_words_are_replaced_by(module)

    def run(bpe: Any, tokenizer: Any, post_process: Any, dataset_impl: Any, replace_unk: str | None) -> Any:
        cfg = SimpleNamespace(
            generation=SimpleNamespace(replace_unk=replace_unk),
            bpe=bpe,
            tokenizer=tokenizer,
            common_eval=SimpleNamespace(post_process=post_process),
            dataset=SimpleNamespace(dataset_impl=dataset_impl),
        )
        return module.main(cfg)

    assert run(**given, replace_unk="") == run(**given | flags, replace_unk=None) == "ran"
    with pytest.raises(FlagError, match=f"^{message}"):
        run(**given | flags, replace_unk="")
