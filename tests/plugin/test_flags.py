"""What the flags build: which layers, of what size, and with which of fairseq's own settings."""

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from tolerances import assert_same
from torch import nn
from toy import language_model, sentences, task, translation_model, translation_sample

from xmoe_fairseq.criterions import MoECrossEntropyCriterion
from xmoe_fairseq.moe import MoELayer, record_routing


def test_layers_are_placed_and_named_as_the_flags_say() -> None:
    def names(model: nn.Module) -> list[str]:
        placed = {
            name.removesuffix(".moe"): m for name, m in model.named_modules() if isinstance(m, MoELayer)
        }
        assert all(name == layer.name for name, layer in placed.items())
        return list(placed)

    assert names(translation_model(moe_freq=2)) == [
        "encoder.layers.1",
        "encoder.layers.3",
        "decoder.layers.1",
    ]
    assert names(translation_model(moe_freq=3, no_moe_encoder=True)) == ["decoder.layers.2"]
    assert names(translation_model(moe_freq=1, no_moe_decoder=True)) == [
        f"encoder.layers.{i}" for i in range(4)
    ]
    assert names(translation_model(moe_freq=0)) == []
    assert names(language_model(moe_freq=1)) == [f"decoder.layers.{i}" for i in range(3)]


def test_dense_model_is_fairseqs_own() -> None:
    model = translation_model(moe_freq=0)
    assert {type(layer).__module__ for layer in (*model.encoder.layers, *model.decoder.layers)} == {
        "fairseq.modules.transformer_layer"
    }
    sample = translation_sample(sentences([5, 4]), sentences([6, 6]))
    criterion = MoECrossEntropyCriterion(task(), False).weigh(0.01, 0.0)
    loss, _, logged = criterion(model, sample)
    stock_loss, _, stock_logged = CrossEntropyCriterion(task(), False)(model, sample)
    assert_same(loss, stock_loss)
    assert logged.keys() == stock_logged.keys()


def test_threshold_is_a_dial_from_one_expert_to_all() -> None:
    means = []
    for threshold in (0.0, 0.3, 0.6, 0.9, 1.0):
        torch.manual_seed(1)
        model = language_model(moe_threshold=threshold, moe_max_experts_per_token=0).eval()
        with record_routing(model) as records:
            model(src_tokens=sentences([9, 9]))
        means.append(records[0][1].experts_per_token)
    assert means == sorted(means)
    assert (means[0], means[-1]) == (1.0, 8.0)


def test_small_experts_partition_the_dense_ffn() -> None:
    layer = language_model(moe_ffn_split=4, moe_num_experts=16).decoder.layers[1].moe
    assert layer.experts.fc1_weight.shape == (16, 12, 32)
    assert layer.dense_ffn_dim == 48
    assert layer.router.max_experts_per_token == 8


def test_fairseqs_own_flags_reach_the_experts() -> None:
    layer = language_model(activation_fn="gelu", activation_dropout=0.25).decoder.layers[1].moe
    inner = torch.randn(1000)
    assert layer.experts.activation is F.gelu  # which fairseq's is, and the native kernel knows
    assert torch.equal(F.gelu(inner), utils.get_activation_fn("gelu")(inner))
    assert layer.experts.activation_dropout == 0.25
    assert language_model(relu_dropout=0.125).decoder.layers[1].moe.experts.activation_dropout == 0.125


def test_fairseqs_swish_is_silu() -> None:
    """Which its command line does not offer, and of which fairseq gives the module's class."""
    model = language_model(activation_fn="swish", moe_freq=1)
    assert model.decoder.layers[0].moe.experts.activation is F.silu
    assert model(src_tokens=sentences([9]))[0].isfinite().all()


def test_capacity_flags_reach_training_and_evaluation_apart() -> None:
    def dropped(model: nn.Module) -> int:
        with record_routing(model) as records:
            model(src_tokens=sentences([9, 9, 9]))
        return sum(routing.rows_wanted - routing.token_R.numel() for _, routing in records)

    training_only = language_model(moe_capacity_factor=0.5, moe_min_capacity=1)
    evaluation_only = language_model(moe_eval_capacity_factor=0.5, moe_min_capacity=1)
    assert dropped(training_only.train()) > 0 and dropped(training_only.eval()) == 0
    assert dropped(evaluation_only.eval()) > 0 and dropped(evaluation_only.train()) == 0
    assert dropped(language_model(moe_eval_capacity_factor=0.5, moe_min_capacity=99).eval()) == 0
