"""One test per mend of adaptive softmax and input, which fails where the mend is taken away."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.modules import AdaptiveSoftmax
from fairseq.modules.adaptive_input import AdaptiveInput
from tolerances import assert_same
from toy import language_model, language_sample, sentences, task, translation_model

from xmoe_fairseq_compat.errors import FlagError

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
        (
            {**TIED, "share_decoder_input_output_embed": True},
            "--share-.* with --adaptive-input: use",
        ),
        (
            {**CUTOFF, "share_decoder_input_output_embed": True},
            "--share-.* with --adaptive-softmax-cutoff:",
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


@pytest.mark.parametrize("name", ["adaptive_input", "tie_adaptive_weights"])
def test_a_translation_model_has_no_adaptive_input(name: str) -> None:
    with pytest.raises(FlagError, match=f"^--{name.replace('_', '-')} is for language models"):
        translation_model(moe_freq=0, **{name: True})
