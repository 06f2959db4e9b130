"""One test per patch of fairseq's tasks, which fails where the patch is taken away."""

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.search import LengthConstrainedBeamSearch, LexicallyConstrainedBeamSearch, Sampling
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask
from fairseq.tasks.semisupervised_translation import SemisupervisedTranslationTask
from fairseq.tasks.translation_from_pretrained_bart import TranslationFromPretrainedBARTTask
from omegaconf import OmegaConf
from toy import dictionary, sentences, translation_model

from xmoe_fairseq_compat.errors import FlagError


def bart_task(data: Path, **flags: Any) -> TranslationFromPretrainedBARTTask:
    cfg = {
        "data": str(data), "source_lang": "en", "target_lang": "de", "langs": "en,de", "dataset_impl": None,
        "upsample_primary": 1, "left_pad_source": True, "left_pad_target": False, "load_alignments": False,
    }  # fmt: skip
    return TranslationFromPretrainedBARTTask.setup_task(Namespace(**cfg | flags))


def test_bart_is_fine_tuned(corpus: tuple[Path, Path]) -> None:
    task = bart_task(corpus[0])
    task.load_dataset("test")
    item, symbols = task.dataset("test")[0], task.tgt_dict
    english, german = symbols.index("[en]"), symbols.index("[de]")
    assert (item["source"][-1], item["target"][-1]) == (english, german)
    assert symbols.unk() not in (english, german)
    with pytest.raises(FlagError, match="^--langs must name the languages of pretraining"):
        bart_task(corpus[0], langs=None)


def test_bart_is_searched_as_the_flags_say(corpus: tuple[Path, Path]) -> None:
    task = bart_task(corpus[0])
    model, german = translation_model(len(task.tgt_dict)), task.tgt_dict.index("[de]")
    sampler = task.build_generator([model], Namespace(sampling=True, beam=2))
    assert isinstance(sampler.search, Sampling) and sampler.eos == german
    matched = task.build_generator([model], Namespace(match_source_len=True, beam=2))
    assert isinstance(matched.search, LengthConstrainedBeamSearch)
    source = torch.cat([sentences([5])[:, :-1], torch.tensor([[german]])], dim=1)
    sample = {"net_input": {"src_tokens": source, "src_lengths": torch.tensor([5])}}
    for hypothesis in matched.generate([model.eval()], sample)[0]:
        assert hypothesis["tokens"][-1] == german and len(hypothesis["tokens"]) == 5
    fused = task.build_generator(
        [model], Namespace(), extra_gen_cls_kwargs={"lm_model": model, "lm_weight": 0.5}
    )
    assert fused.lm_weight == 0.5 and fused.eos == german


@pytest.mark.parametrize(
    ("learned", "bos", "longest"), [(True, True, 16), (True, False, 16), (False, True, 17)]
)
def test_blocks_with_a_bos_fit_learned_positions(
    learned: bool, bos: bool, longest: int, corpus: tuple[Path, Path]
) -> None:
    given = {"data": str(corpus[1]), "tokens_per_sample": 16, "add_bos_token": bos, "dataset_impl": None}
    plain = {"use_plasma_view": False, "plasma_path": "", "sample_break_mode": "none", "seed": 1}
    defaults = {field.name: field.default for field in fields(LanguageModelingConfig)}
    task = LanguageModelingTask.setup_task(Namespace(**defaults | given | plain))
    cfg = {
        "_name": "xmoe_transformer_lm_tiny", "decoder_learned_pos": learned, "decoder_layers": 1,
        "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 16, "decoder_attention_heads": 2, "moe_freq": 0,
    }  # fmt: skip
    model = task.build_model(OmegaConf.create({"model": cfg}).model)
    task.load_dataset("train")
    assert task.args.tokens_per_sample == 16
    data = task.dataset("train")
    lengths = [len(data[index]["source"]) for index in range(len(data))]
    assert max(lengths) == longest
    batch = data.collater([data[lengths.index(longest)]])
    model(**batch["net_input"])


@pytest.mark.parametrize("kind", [MultilingualTranslationTask, SemisupervisedTranslationTask])
def test_a_task_of_several_models_names_an_architecture(kind: type) -> None:
    name = kind.__module__.rpartition(".")[2]
    message = f"^--task {name} needs an architecture with a model for each pair.*got --arch transformer_lm;"
    with pytest.raises(FlagError, match=message):
        kind.build_model(Namespace(), Namespace(arch="transformer_lm"))


def test_constraints_that_do_not_arrive_are_refused() -> None:
    search = LexicallyConstrainedBeamSearch(dictionary(8), "ordered")
    with pytest.raises(FlagError, match="^--constraints needs a task that hands them on"):
        search.init_constraints(None, 2)
    search.init_constraints(torch.tensor([[1, 5, 0]]), 2)
    assert len(search.constraint_states[0]) == 2
