"""The penalty on the FFNs' activations (--ffn-sparsity-coeff), of dense models."""

from typing import Any

import numpy as np
import pytest
import torch
from fairseq import metrics
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from tolerances import about, assert_same
from toy import language_model, language_sample, sentences, task, translation_model, translation_sample

from xmoe_fairseq.criterions import MoECrossEntropyCriterion, MoELabelSmoothedCrossEntropyCriterion
from xmoe_fairseq.moe.losses import mean_magnitude, square_hoyer
from xmoe_fairseq_compat.errors import FlagError

PAD = 1


def criterion(coeff: float = 0.5, kind: str = "hoyer", sentence_avg: bool = False) -> Any:
    return MoELabelSmoothedCrossEntropyCriterion(task(), sentence_avg, 0.1).sparsify(coeff, kind)


def sample(sources: list[int], targets: list[int]) -> dict[str, Any]:
    return translation_sample(sentences(sources, left_pad=True), sentences(targets))


def hidden_of(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """(T, F) of each layer: what a ReLU gives for the tokens that are no padding, computed anew."""
    found: list[torch.Tensor] = []
    inputs = batch["net_input"]
    handles = []
    for stack, ids in ((model.encoder, inputs["src_tokens"]), (model.decoder, inputs["prev_output_tokens"])):
        real = ids.ne(PAD).t()
        for layer in stack.layers:
            handles.append(layer.fc1.register_forward_hook(
                lambda _, __, output, real=real: found.append(output.relu()[real])))  # fmt: skip
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def test_square_hoyer_by_hand() -> None:
    rows = torch.tensor([[2.0, 2, 2, 2], [0, 0, 5, 0], [0, 0, 0, 0], [1, 3, 0, 0]], requires_grad=True)
    values = square_hoyer(rows)
    assert_same(values.detach(), torch.tensor([1, 0.25, 0, 16 / 40]))
    values.sum().backward()
    assert torch.isfinite(rows.grad).all() and rows.grad[3, 0] > 0 > rows.grad[3, 1]
    assert_same(mean_magnitude(rows).detach(), torch.tensor([2, 1.25, 0, 1]))
    wide = torch.full((1, 4096), 100.0, dtype=torch.half)  # whose squares' sum is beyond fp16
    assert square_hoyer(wide).item() == about(1.0) and mean_magnitude(wide).item() == 100


@pytest.mark.parametrize("kind", ["hoyer", "l1"])
@pytest.mark.parametrize("sentence_avg", [False, True])
def test_it_is_a_mean_over_real_tokens_and_layers_times_the_sample_size(
    kind: str, sentence_avg: bool
) -> None:
    model, batch = translation_model(moe_freq=0), sample([5, 7, 3], [6, 4, 8])
    stock, size, _ = LabelSmoothedCrossEntropyCriterion(task(), sentence_avg, 0.1)(model, batch)
    loss, same_size, logs = criterion(0.5, kind, sentence_avg)(model, batch)
    hidden = hidden_of(model, batch)
    assert len(hidden) == 7 and size == same_size
    of_tokens = {"hoyer": lambda h: h.sum(1) ** 2 / (h.size(1) * (h**2).sum(1)), "l1": lambda h: h.mean(1)}
    penalty = sum(of_tokens[kind](h).mean() for h in hidden) / 7
    assert (loss - stock).item() == about(0.5 * size * penalty, scale=stock)
    assert logs["loss"].item() == about(stock)  # the task's own
    assert logs["ffn_active"] == sum((h > 0).sum() for h in hidden)
    assert logs["ffn_neurons"] == sum(h.numel() for h in hidden)
    unreduced, _, _ = criterion(0.5, kind, sentence_avg)(model, batch, reduce=False)
    assert unreduced.sum().item() == about(stock)


def test_padding_counts_for_nothing() -> None:
    """Of sentences in one batch the sums are those of batches without padding."""
    model = translation_model(moe_freq=0).eval()
    source, target = sentences([5, 9], left_pad=True), sentences([6, 3])
    whole = criterion()(model, translation_sample(source, target))[2]
    short = criterion()(model, translation_sample(source[:1, 4:], target[:1]))[2]
    long = criterion()(model, translation_sample(source[1:], target[1:, :3]))[2]
    for name in ("ffn_active", "ffn_neurons"):
        assert whole[name] == short[name] + long[name]


def test_what_is_logged_is_divided_once() -> None:
    model, logs = translation_model(moe_freq=0), []
    for lengths in ([5, 7], [3]):
        logs.append(criterion()(model, sample(lengths, lengths))[2])
    with metrics.aggregate(new_root=True) as aggregator:
        MoELabelSmoothedCrossEntropyCriterion.reduce_metrics(logs)
    values = aggregator.get_smoothed_values()
    total = {name: sum(float(log[name]) for log in logs) for name in (*logs[0],)}
    assert values["ffn_active"] == round(total["ffn_active"] / total["ffn_neurons"], 4)
    assert values["ffn_penalty"] == round(total["ffn_penalty"] / total["sample_size"], 4)
    assert 0 < values["ffn_penalty"] < 1


def test_nothing_is_watched_without_a_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", None)
    logs = criterion(0.0)(translation_model(moe_freq=0), sample([4], [4]))[2]
    assert not [name for name in logs if name.startswith("ffn_")]


def test_keys_and_types_do_not_depend_on_the_layers_that_layerdrop_leaves_out() -> None:
    model = language_model(moe_freq=0, decoder_layers=1, decoder_layerdrop=0.5).train()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        np.random.seed(seed)
        logs = MoECrossEntropyCriterion(task(), False).sparsify(0.5, "hoyer")(
            model, language_sample(sentences([6, 4]))
        )[2]
        seen.add(float(logs["ffn_neurons"]))
        assert all(torch.is_tensor(logs[f"ffn_{name}"]) for name in ("penalty", "active", "neurons"))
    assert seen == {0.0, 10 * 48.0}


@pytest.mark.parametrize("kind", ["hoyer", "l1"])
def test_it_makes_activations_sparse(kind: str) -> None:
    torch.manual_seed(2)
    model, batch = language_model(moe_freq=0), language_sample(sentences([9, 7, 8]))
    penalised = MoECrossEntropyCriterion(task(), False).sparsify(3.0, kind)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    shares = []
    for _ in range(25):
        loss, size, logs = penalised(model, batch)
        shares.append(float(logs["ffn_active"] / logs["ffn_neurons"]))
        optimizer.zero_grad()
        (loss / size).backward()
        optimizer.step()
    assert shares[-1] < 0.6 * shares[0]


def refused(model: Any) -> str:
    with pytest.raises(FlagError) as raised:
        MoECrossEntropyCriterion(task(), False).sparsify(0.1, "l1")(model, language_sample(sentences([4, 3])))
    return str(raised.value)


def test_what_is_refused() -> None:
    assert refused(language_model()) == (
        "--ffn-sparsity-coeff needs a dense model (--moe-freq 0), got 1 MoE layers"
    )
    assert "needs --activation-fn relu, got gelu" in refused(language_model(moe_freq=0, activation_fn="gelu"))
    model = language_model(moe_freq=0)
    model.decoder.layers[0] = checkpoint_wrapper(model.decoder.layers[0])
    assert "cannot be combined with --checkpoint-activations" in refused(model)
    del model.decoder.layers[:]
    assert "needs a model of fairseq's Transformer layers, got" in refused(model)
    with pytest.raises(FlagError, match="--ffn-sparsity must be one of hoyer, l1, got l2"):
        criterion(0.1, "l2")
    for coeff in (-1.0, float("nan"), float("inf")):
        with pytest.raises(FlagError, match="--ffn-sparsity-coeff must be 0"):
            criterion(coeff)
