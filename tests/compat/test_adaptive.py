"""One test per patch of adaptive softmax and input, which fails where the patch is taken away."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.modules import AdaptiveSoftmax
from fairseq.modules.adaptive_input import AdaptiveInput
from fairseq.sequence_generator import SequenceGenerator
from tolerances import assert_same
from toy import (
    dictionary,
    language_model,
    language_sample,
    sentences,
    task,
    translation_model,
    translation_sample,
)

from xmoe_fairseq_compat.errors import FlagError

SHARED = {"share_decoder_input_output_embed": True}
CUTOFF = {"adaptive_softmax_cutoff": "10,20"}
TIED = {**CUTOFF, "adaptive_input": True, "adaptive_input_cutoff": "10,20", "tie_adaptive_weights": True}


def dense_model(**flags: Any) -> Any:
    return language_model(moe_freq=0, **flags).train()


def test_the_adaptive_loss_names_the_cutoff() -> None:
    with pytest.raises(FlagError, match="^--criterion adaptive_loss needs a model with --adaptive-softmax"):
        AdaptiveLoss(task(), False)(dense_model(), language_sample(sentences([5])))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_adaptive_loss_refuses_ddp_on_several_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairseq.distributed.utils.get_global_world_size", lambda: ranks)
    cfg = SimpleNamespace(ddp_backend="pytorch_ddp", sentence_avg=False)
    if ranks == 1:
        assert isinstance(AdaptiveLoss.build_criterion(cfg, task()), AdaptiveLoss)
    else:
        with pytest.raises(FlagError, match="needs --ddp-backend legacy_ddp, got pytorch_ddp$"):
            AdaptiveLoss.build_criterion(cfg, task())


def test_another_loss_of_an_adaptive_softmax_is_for_evaluation() -> None:
    model, sample = dense_model(**CUTOFF), language_sample(sentences([5, 7]))
    with pytest.raises(FlagError, match="^--adaptive-softmax-cutoff needs --criterion adaptive_loss$"):
        CrossEntropyCriterion(task(), False)(model, sample)
    model.eval()
    with torch.no_grad():
        expected = AdaptiveLoss(task(), False)(model, sample)[0]
        loss = CrossEntropyCriterion(task(), False)(model, sample)[0]
    assert_same(loss, expected.squeeze())


@pytest.mark.parametrize(
    ("cutoff", "shown"),
    [([], "None"), ([20, 10], "20,10"), ([10, 50], "10,50"), ([0, 9], "0,9"), ([9, 9], "9,9")],
)
def test_cutoffs_must_rise_within_the_vocabulary(cutoff: list[int], shown: str) -> None:
    rule = f"must rise, to the size of the vocabulary, 40, at most, got {shown}"
    with pytest.raises(FlagError) as error:
        AdaptiveSoftmax(40, 16, cutoff, 0.0)
    assert str(error.value) == f"--adaptive-softmax-cutoff {rule}"
    with pytest.raises(FlagError) as error:
        AdaptiveInput(40, 1, 16, 4, 16, cutoff or None)
    assert str(error.value) == f"--adaptive-input-cutoff {rule}"
    assert AdaptiveSoftmax(40, 16, [10, 40], 0.0).cutoff == [10, 40]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({**TIED, **SHARED}, "--share-.* be combined with --adaptive-input$"),
        ({**CUTOFF, **SHARED}, "--share-.* be combined with --adaptive-softmax-cutoff$"),
        ({**SHARED, "character_embeddings": True}, "--share-.* be combined with --character-embeddings$"),
        (
            {**TIED, "decoder_input_dim": 16, "decoder_output_dim": 16},
            "--decoder-output-dim must be --decoder-embed-dim 32 with --tie-adaptive-weights, got 16$",
        ),
        ({**CUTOFF, "tie_adaptive_weights": True}, "--tie-adaptive-weights needs --adaptive-input$"),
        (
            {**TIED, "adaptive_softmax_cutoff": "10"},
            "--adaptive-softmax-cutoff must be --adaptive-input-cutoff 10,20 with --tie-.*, got 10$",
        ),
        ({**TIED, "adaptive_input_factor": 2}, "--adaptive-softmax-factor must be --adaptive-input-factor 2"),
        ({**TIED, "decoder_input_dim": 16}, "--decoder-output-dim must be --decoder-input-dim 16"),
    ],
)
def test_adaptive_flags_that_do_not_fit(flags: dict[str, Any], message: str) -> None:
    dense_model(**TIED)
    with pytest.raises(FlagError, match=f"^{message}"):
        dense_model(**flags)


NOTHING = "does nothing in a translation model: leave it out$"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"adaptive_input": True}, f"--adaptive-input {NOTHING}"),
        ({"tie_adaptive_weights": True}, f"--tie-adaptive-weights {NOTHING}"),
        ({"char_inputs": True}, f"--char-inputs {NOTHING}"),
        ({**CUTOFF, **SHARED}, "--share-.* be combined with --adaptive-softmax-cutoff$"),
    ],
)
def test_embeddings_that_a_translation_model_has_not(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError, match=f"^{message}"):
        translation_model(moe_freq=0, **{"share_decoder_input_output_embed": False} | flags)


def test_an_adaptive_softmax_over_shared_embeddings_is_loaded_again() -> None:
    flags = {**CUTOFF, "share_decoder_input_output_embed": False, "share_all_embeddings": True}
    model, again = (translation_model(moe_freq=0, **flags).eval() for _ in range(2))
    again.load_state_dict(model.state_dict())
    batch = translation_sample(sentences([5]), sentences([7]))["net_input"]
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], model(**batch)[0])


def test_an_adaptive_softmax_is_not_tempered() -> None:
    model = translation_model(moe_freq=0, share_decoder_input_output_embed=False, **CUTOFF)
    SequenceGenerator([model], dictionary(40))
    with pytest.raises(FlagError, match="^--temperature must be 1 with an adaptive softmax, got 0.5$"):
        SequenceGenerator([model], dictionary(40), temperature=0.5)
