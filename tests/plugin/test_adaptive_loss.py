"""moe_adaptive_loss, and an adaptive softmax under the other criterions."""

import numpy as np
import pytest
import torch
from fairseq import metrics
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from tolerances import about, printed
from toy import language_model, language_sample, sentences, task

from xmoe_fairseq.criterions import MoEAdaptiveLoss, MoEAdaptiveLossConfig, MoECrossEntropyCriterion
from xmoe_fairseq.moe import record_routing

ADAPTIVE = {"adaptive_softmax_cutoff": "10,20"}


def test_the_adaptive_loss_is_fairseqs_own_with_the_load_balance_loss() -> None:
    model, batch = language_model(**ADAPTIVE).train(), language_sample(sentences([6, 9]))
    with record_routing(model) as records:
        stock, size, _ = AdaptiveLoss(task(), False)(model, batch)
    loss, same_size, logged = MoEAdaptiveLoss(task(), False).weigh(0.3, 0.2)(model, batch)
    expected = sum(0.3 * r.load_balance_loss + 0.2 * r.z_loss for _, r in records) * size
    assert size == same_size and records
    assert (loss - stock).item() == about(expected, scale=stock)
    assert logged["loss"].item() == about(stock)
    assert logged["moe_decoder_tokens"] > 0
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with metrics.aggregate(new_root=True) as aggregator:
        MoEAdaptiveLoss.reduce_metrics([logged, logged])
    values = aggregator.get_smoothed_values()
    assert values["loss"] == printed(stock.item() / size / np.log(2), 3)
    assert values["moe_decoder_load_balance_loss"] > 0


def test_an_adaptive_softmax_is_trained_by_its_own_loss() -> None:
    model, batch = language_model(**ADAPTIVE).train(), language_sample(sentences([6, 9]))
    plain = MoECrossEntropyCriterion(task(), False).weigh(0.1, 0.0)
    with pytest.raises(ValueError, match="^--adaptive-softmax-cutoff needs --criterion moe_adaptive_loss$"):
        plain(model, batch)
    with pytest.raises(
        ValueError, match="^--criterion moe_adaptive_loss needs a model with --adaptive-softmax"
    ):
        MoEAdaptiveLoss(task(), False).weigh(0.1, 0.0)(language_model(), batch)
    model.eval()
    with torch.no_grad():
        adaptive = MoEAdaptiveLoss(task(), False).weigh(0.1, 0.0)(model, batch)[2]
        assert plain(model, batch)[2]["loss"].item() == about(adaptive["loss"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_adaptive_loss_needs_a_backend_that_bears_unused_weights(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairseq.distributed.utils.get_global_world_size", lambda: ranks)
    cfg = MoEAdaptiveLossConfig(sentence_avg=False, ddp_backend="pytorch_ddp")
    if ranks == 1:
        assert MoEAdaptiveLoss.build_criterion(cfg, task()).loss_weights["load_balance_loss"] == 0.01
    else:
        with pytest.raises(ValueError, match="^--criterion moe_adaptive_loss needs --ddp-backend legacy_ddp"):
            MoEAdaptiveLoss.build_criterion(cfg, task())
