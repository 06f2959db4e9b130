"""Whole models: causal, padding- and batch-invariant, incremental decoding equals the full forward."""

import copy
from typing import Any

import pytest
import torch
from tolerances import assert_same
from torch import Tensor, nn
from toy import (
    PAD,
    language_model,
    language_sample,
    sentences,
    shift_right,
    task,
    translation_model,
    translation_sample,
)

from xmoe_fairseq.criterions import MoECrossEntropyCriterion

ROUTERS = [
    {"moe_threshold": 0.5},
    {"moe_shared_experts": 1},
    {"moe_zero_experts": 1, "moe_copy_experts": 2, "moe_constant_experts": 2, "moe_threshold": 0.6},
    {"moe_threshold": 1.0, "moe_max_experts_per_token": 0},
    {"moe_threshold_rule": "probability", "moe_threshold": 0.13},
    {"moe_threshold_rule": "relative", "moe_threshold": 0.4},
    {"moe_router": "topk", "moe_topk": 2},
    {"moe_combine": "normalized", "moe_output_scale": 2.0},
    {"moe_router": "base"},
    {"moe_router": "expert_threshold", "moe_topk": 2, "moe_expert_choice_updates": 9},
    {"moe_router": "relu"},
    {"moe_router": "topany"},
    {"moe_router": "hash", "moe_hash_table": "random"},
]
router_cases = pytest.mark.parametrize("router", ROUTERS, ids=lambda r: "-".join(str(v) for v in r.values()))


def log_probs(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model.get_normalized_probs(model(**inputs), log_probs=True)


def source_inputs(source: Tensor) -> dict[str, Tensor]:
    return {"src_tokens": source, "src_lengths": source.ne(PAD).sum(dim=1)}


@router_cases
def test_language_model_is_causal(router: dict) -> None:
    model = language_model(**router).eval()
    tokens = sentences([12, 12, 12])
    changed = tokens.clone()
    changed[:, 7:] = sentences([5, 5, 5])
    before, after = (log_probs(model, src_tokens=t)[:, :7] for t in (tokens, changed))
    assert_same(after, before)


def test_language_model_is_causal_in_training_too() -> None:
    model = language_model().train()
    tokens = sentences([12, 12])
    changed = tokens.clone()
    changed[:, 7:] = sentences([5, 5])
    before, after = (model(src_tokens=t)[0][:, :7] for t in (tokens, changed))
    assert_same(after, before)


@router_cases
def test_decoder_is_causal(router: dict) -> None:
    model = translation_model(**router).eval()
    source, previous = sentences([6, 9], left_pad=True), shift_right(sentences([10, 10]))
    changed = previous.clone()
    changed[:, 6:] = sentences([4, 4])
    before, after = (
        log_probs(model, **source_inputs(source), prev_output_tokens=p)[:, :6] for p in (previous, changed)
    )
    assert_same(after, before)


@router_cases
def test_a_sentence_gets_the_same_log_probabilities_alone_and_in_any_batch(router: dict) -> None:
    model = translation_model(**router).eval()
    lengths = [3, 11, 7, 5]
    source, target = sentences(lengths, left_pad=True), sentences(lengths[::-1])
    together = log_probs(model, **source_inputs(source), prev_output_tokens=shift_right(target))
    for row, (source_length, target_length) in enumerate(zip(lengths, lengths[::-1], strict=True)):
        alone = log_probs(
            model,
            **source_inputs(source[row : row + 1, -source_length:]),
            prev_output_tokens=shift_right(target[row : row + 1, :target_length]),
        )
        assert_same(alone[0], together[row, :target_length])


@router_cases
def test_padding_changes_nothing(router: dict) -> None:
    model = translation_model(**router).eval()
    source, target = sentences([4, 6], left_pad=True), sentences([5, 7])
    wide_source = torch.cat([torch.full((2, 5), PAD), source], dim=1)
    wide_target = torch.cat([target, torch.full((2, 4), PAD)], dim=1)
    plain = log_probs(model, **source_inputs(source), prev_output_tokens=shift_right(target))
    padded = log_probs(model, **source_inputs(wide_source), prev_output_tokens=shift_right(wide_target))
    real = target.ne(PAD)
    assert_same(padded[:, :7][real], plain[real])


def test_padding_does_not_change_the_loss_or_its_gradients() -> None:
    model = translation_model().train()
    criterion = MoECrossEntropyCriterion(task(), False).weigh(0.1, 0.01)
    source, target = sentences([4, 6], left_pad=True), sentences([5, 7])
    results = []
    for pad in (0, 6):
        model.zero_grad()
        sample = translation_sample(
            torch.cat([torch.full((2, pad), PAD), source], dim=1),
            torch.cat([target, torch.full((2, pad), PAD)], dim=1),
        )
        loss, _, logged = criterion(model, sample)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), logged, gradients))
    (loss, logged, gradients), (padded_loss, padded_logged, padded_gradients) = results
    assert_same(padded_loss, loss)
    assert torch.equal(padded_logged["moe_encoder_tokens"], logged["moe_encoder_tokens"])
    assert_same(padded_gradients, gradients)


@router_cases
@pytest.mark.parametrize("kind", ["language", "translation"])
def test_incremental_decoding_equals_the_full_forward(kind: str, router: dict) -> None:
    target = sentences([9, 9])
    if kind == "language":
        model, encoder_out = language_model(**router).eval(), None
        full = log_probs(model, src_tokens=target)
    else:
        model, source = translation_model(**router).eval(), sentences([5, 8], left_pad=True)
        full = log_probs(model, **source_inputs(source), prev_output_tokens=target)
        with torch.no_grad():
            encoder_out = model.encoder(**source_inputs(source))
    state: dict = {}
    for step in range(target.size(1)):
        with torch.no_grad():
            output = model.decoder(target[:, : step + 1], encoder_out=encoder_out, incremental_state=state)
        now = model.get_normalized_probs(output, log_probs=True)[:, -1]
        assert_same(now, full[:, step])


@pytest.mark.parametrize("kind", ["language", "translation"])
@pytest.mark.parametrize("offload", [False, True])
def test_checkpointed_activations_give_the_same_gradients_and_count_the_loss_once(
    kind: str, offload: bool
) -> None:
    build = language_model if kind == "language" else translation_model
    target = sentences([6, 9])
    sample = language_sample(target) if kind == "language" else translation_sample(sentences([7, 4]), target)
    criterion = MoECrossEntropyCriterion(task(), False).weigh(0.5, 0.1)
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = build(
            checkpoint_activations=recompute, offload_activations=recompute and offload, dropout=0.2
        ).train()
        torch.manual_seed(4)
        loss, _, logged = criterion(model, sample)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), logged, gradients))
    (loss, logged, gradients), (loss_again, logged_again, gradients_again) = results
    assert_same(loss_again, loss)
    assert logged_again["moe_decoder_tokens"] == logged["moe_decoder_tokens"] == sample["ntokens"]
    assert_same(gradients_again, gradients)


@pytest.mark.parametrize("offload", [False, True])
def test_a_deep_copy_runs_its_own_layers(offload: bool) -> None:
    """As fairseq's EMA needs."""
    model = language_model(checkpoint_activations=True, offload_activations=offload).eval()
    copied, tokens = copy.deepcopy(model), sentences([6, 6])
    before = log_probs(model, src_tokens=tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(log_probs(copied, src_tokens=tokens), before)
