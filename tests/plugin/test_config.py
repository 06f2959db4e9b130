"""Every flag is checked where all configurations pass: when the model is built."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields

import pytest
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY, build_model
from fairseq.models.transformer import TransformerModel
from omegaconf import OmegaConf
from toy import language_model, task, translation_model

from xmoe_fairseq.config import MoEConfig, read_moe_config
from xmoe_fairseq.model_config import complete_namespace
from xmoe_fairseq.models.language_model import XMoETransformerLanguageModelConfig
from xmoe_fairseq.models.translation import XMoETransformerConfig, XMoETransformerModel
from xmoe_fairseq.moe import moe_layers
from xmoe_fairseq.moe.routers.registry import registered_routers
from xmoe_fairseq.moe.routers.threshold_flags import max_experts_per_token
from xmoe_fairseq.moe.routers.topk import experts_per_token
from xmoe_fairseq_compat.errors import FlagError

UNKNOWN = (
    f"--moe-router must be one of {', '.join(registered_routers())}, got best; a router of somebody's own "
    "needs the --user-dir that registers it"
)
CHOOSERS = "threshold or seq_topk or topk"  # that take cheap experts
BAD = [
    ({"moe_freq": -1}, "--moe-freq must be 0 (dense) or more, got -1"),
    ({"moe_freq": 4}, "--moe-freq must be at most --decoder-layers 3 (0 = dense), got 4"),
    (
        {"moe_router": "best"},
        UNKNOWN,
    ),
    ({"moe_num_experts": 0}, "--moe-num-experts must be in [1, 2^20], got 0"),
    ({"moe_num_experts": 2.5}, "--moe-num-experts must be of type int, got 2.5"),
    ({"moe_ffn_split": 0}, "--moe-ffn-split must be at least 1, got 0"),
    ({"moe_ffn_split": 7}, "--moe-ffn-split must divide --decoder-ffn-embed-dim 48, got 7"),
    ({"moe_shared_experts": -1}, "--moe-shared-experts must be 0 (none) or more, got -1"),
    (
        {"moe_router": "gshard", "moe_shared_experts": 1},
        "--moe-shared-experts must be 0 with --moe-router gshard, which is a layer of its own, got 1",
    ),
    (
        {"moe_shared_experts": 1, "moe_target_experts_per_token": 1.5},
        "and --moe-num-experts, plus --moe-shared-experts, got 1.5",
    ),
    ({"moe_zero_experts": -1}, "--moe-zero-experts must be 0 (none) or more, got -1"),
    *(
        (
            {"moe_copy_experts": 1, "moe_router": n},
            f"--moe-copy-experts needs --moe-router {CHOOSERS}, got {n}",
        )
        for n in ("hash", "relu", "topany")
    ),
    *(
        (
            {"moe_constant_experts": 1, "moe_combine": combine},
            f"--moe-combine must be probs with zero, copy or constant experts, got {combine}",
        )
        for combine in ("ones", "normalized")
    ),
    *(
        (
            {"moe_cheap_balance": tau, **flags},
            "--moe-cheap-balance must be above 0, and 1 without such experts or without a loss "
            f"(--moe-balance bias, none), got {tau}",
        )
        for tau, flags in (
            (0.5, {}),
            (0.5, {"moe_zero_experts": 1, "moe_balance": "bias"}),
            (0.0, {"moe_zero_experts": 1}),
            (float("inf"), {"moe_zero_experts": 1}),
        )
    ),
    ({"moe_threshold": 1.01}, "--moe-threshold must be in [0, 1], got 1.01"),
    ({"moe_threshold": float("nan")}, "--moe-threshold must be in [0, 1], got nan"),
    ({"moe_threshold": "0.5"}, "--moe-threshold must be of type float, got '0.5'"),
    (
        {"moe_threshold_rule": "best"},
        "--moe-threshold-rule must be one of auto, mass, probability, relative, got best",
    ),
    ({"moe_threshold_rule": 1}, "--moe-threshold-rule must be of type str, got 1"),
    (
        {"moe_threshold_rule": "relative", "moe_router": "topk"},
        "--moe-threshold-rule needs --moe-router threshold, got topk",
    ),
    (
        {"moe_threshold_rule": "probability", "moe_threshold": 1.5},
        "--moe-threshold must be in [0, 1], got 1.5",
    ),
    *(
        (
            {"moe_threshold_rule": rule, "moe_target_experts_per_token": 0},
            f"--moe-threshold must be given with --moe-threshold-rule {rule} and "
            "--moe-target-experts-per-token 0; 0.9 is for mass",
        )
        for rule in ("probability", "relative")
    ),
    (
        {"moe_threshold": 0.0, "moe_target_experts_per_token": 2},
        "--moe-threshold cannot be combined with --moe-target-experts-per-token 2, got 0.0",
    ),
    (
        {"moe_threshold": 0.9, "moe_layer_thresholds": "0.5"},
        "--moe-threshold cannot be combined with --moe-layer-thresholds 0.5, got 0.9",
    ),
    *(
        (
            {"moe_target_experts_per_token": target},
            "--moe-target-experts-per-token must be -1 (half of --moe-ffn-split), 0 (off), or from 1 to "
            "--moe-max-experts-per-token (default: 2s) and --moe-num-experts, plus --moe-shared-experts, "
            f"got {target}",
        )
        for target in (0.5, -2, 5, float("nan"))
    ),
    (
        {"moe_target_experts_per_token": 2, "moe_router": "topk"},
        "--moe-target-experts-per-token needs --moe-router threshold, got topk",
    ),
    (
        {"moe_target_experts_per_token": 2, "moe_layer_thresholds": "0.5"},
        "--moe-layer-thresholds cannot be combined with --moe-target-experts-per-token, got 0.5",
    ),
    (
        {"moe_layer_thresholds": "0.5", "moe_router": "topk"},
        "--moe-layer-thresholds needs --moe-router threshold, got topk",
    ),
    *(
        (
            {"moe_layer_thresholds": given},
            f"--moe-layer-thresholds must give each of the 1 MoE layers a number in [0, 1], got {given}",
        )
        for given in ("0.5,0.5", "1.5", "half", "nan", ",")
    ),
    ({"moe_router_hidden_dim": -1}, "--moe-router-hidden-dim must be 0 (none) or more, got -1"),
    *(
        (
            {"moe_router_hidden_dim": 8, "moe_router": name},
            f"--moe-router-hidden-dim must be 0 with --moe-router {name}, whose scores are its own, got 8",
        )
        for name in ("topany", "hash", "gshard")
    ),
    ({"moe_router_temperature": 0}, "--moe-router-temperature must be from 1e-6 to 1e6, got 0"),
    ({"moe_router_temperature": 1e-320}, "--moe-router-temperature must be from 1e-6 to 1e6, got 1e-320"),
    ({"moe_router_init_scale": -1.0}, "--moe-router-init-scale must be from 1e-6 to 1e6, got -1.0"),
    ({"moe_router_init_scale": 1e308}, "--moe-router-init-scale must be from 1e-6 to 1e6, got 1e"),
    (
        {"moe_router_temperature": 0.5, "moe_router": "hash"},
        "--moe-router-temperature must be 1 with --moe-router hash, whose scores",
    ),
    (
        {"moe_topk": 2},
        "--moe-topk needs --moe-router expert_choice or expert_threshold or relu or seq_topk or topk, got",
    ),
    ({"moe_router": "expert_threshold", "moe_topk": 9}, "must be at most --moe-num-experts 8, got 9"),
    (
        {"moe_router": "expert_threshold", "moe_capacity_factor": 1.0},
        "--moe-capacity-factor must be 0 with --moe-router expert_threshold, which has a capacity of its own",
    ),
    (
        {"moe_router": "expert_threshold", "moe_expert_choice_updates": -1},
        "--moe-expert-choice-updates must be 0 or more, got -1",
    ),
    (
        {"moe_expert_choice_updates": 10},
        "--moe-expert-choice-updates needs --moe-router expert_threshold, got threshold",
    ),
    (
        {"moe_router": "expert_threshold", "moe_threshold_decay": 1.0},
        "--moe-threshold-decay must be in [0, 1)",
    ),
    (
        {"moe_threshold_decay": 0.9},
        "--moe-threshold-decay needs --moe-router expert_threshold, got threshold",
    ),
    (
        {"moe_router": "seq_topk"},
        "--moe-router seq_topk cannot be used in a decoder: it chooses among all tokens of a batch",
    ),
    ({"moe_router": "topk", "moe_topk": 9}, "must be at most --moe-num-experts 8, got 9"),
    ({"moe_router": "topk", "moe_topk": -1}, "--moe-topk must be 0 (= --moe-ffn-split) or more"),
    ({"moe_hash_table": "perfect"}, "--moe-hash-table must be one of balanced, random, got perfect"),
    (
        {"moe_router": "expert_choice"},
        "--moe-router expert_choice cannot be used in a decoder: it chooses among all tokens",
    ),
    (
        {"moe_router": "expert_choice", "moe_capacity_factor": 1.0},
        "--moe-capacity-factor must be 0 with --moe-router expert_choice, which has a capacity of its own",
    ),
    (
        {"moe_router": "gshard", "moe_eval_capacity_factor": 2.0},
        "--moe-eval-capacity-factor must be 0 with --moe-router gshard, which has a capacity of its own",
    ),
    (
        {"moe_router": "gshard", "moe_expert_parallel_size": -1},
        "--moe-expert-parallel-size must be 1 with --moe-router gshard (fairscale",
    ),
    (
        {"moe_router": "gshard", "moe_num_experts": 1},
        "--moe-num-experts must be at least 2 with --moe-router gshard, got 1",
    ),
    ({"moe_kernel": "fast"}, "--moe-kernel must be one of auto, native, grouped, plain"),
    (
        {"moe_router": "gshard", "moe_kernel": "plain"},
        "--moe-kernel must be auto with --moe-router gshard, whose experts are fairscale's, got plain",
    ),
    ({"moe_balance": "even"}, "--moe-balance must be one of first, all, global, bias, none, got even"),
    (
        {"moe_balance": "bias", "moe_router": "hash"},
        "--moe-balance needs --moe-router threshold or seq_topk or topk, got",
    ),
    (
        {"moe_balance": "none", "moe_router": "base"},
        "--moe-balance needs --moe-router threshold or seq_topk or topk, got",
    ),
    (
        {"moe_balance": "all", "moe_router": "relu"},
        "--moe-balance needs --moe-router threshold or seq_topk or topk",
    ),
    *(
        (
            {"moe_balance_step": u, **flags},
            f"--moe-balance-step must be above 0, and 0.001 without --moe-balance bias, got {u}",
        )
        for u, flags in ((0.01, {}), (0.01, {"moe_balance": "global"}), (0.0, {"moe_balance": "bias"}))
    ),
    ({"moe_topk": 9, "moe_router": "relu"}, "must be at most --moe-num-experts 8, got 9"),
    (
        {"moe_router": "topany", "moe_router_init_scale": 2.0},
        "--moe-router-init-scale must be 1 with --moe-router topany, whose scores are cosines, got 2.0",
    ),
    (
        {"moe_router": "topany", "moe_balance": "bias"},
        "--moe-balance needs --moe-router threshold or seq_topk or topk",
    ),
    (
        {"moe_adapt_experts_every": 2},
        "--moe-adapt-experts-every needs --moe-router topany, got threshold",
    ),
    (
        {"moe_router": "topany", "moe_adapt_experts_every": -1},
        "--moe-adapt-experts-every must be 0 (never) or more, got -1",
    ),
    *(
        (
            {"moe_router": "topany", "moe_initial_experts": n, "moe_adapt_experts_every": every},
            "--moe-initial-experts must be 0 (all) or, with --moe-adapt-experts-every, from 1 to "
            f"--moe-num-experts, got {n}",
        )
        for n, every in ((2, 0), (9, 5), (-1, 5))
    ),
    ({"moe_combine": "sum"}, "--moe-combine must be one of probs, ones, normalized, got sum"),
    (
        {"moe_combine": "ones", "moe_router": "base"},
        "must be probs with --moe-router base: only threshold, topk take ones, got ones",
    ),
    (
        {"moe_combine": "normalized", "moe_router": "hash"},
        "must be probs with --moe-router hash: only threshold, expert_choice, ",
    ),
    ({"moe_output_scale": 0.0}, "--moe-output-scale must be from 1e-6 to 1e6, got 0.0"),
    (
        {"moe_output_scale": 2.0, "moe_router": "gshard"},
        "--moe-output-scale must be 1 with --moe-router gshard, whose sums are fairscale's, got 2.0",
    ),
    ({"moe_max_experts_per_token": -2}, "--moe-max-experts-per-token must be -1 (= 2 x --moe-ffn-split), 0"),
    ({"moe_capacity_factor": -0.5}, "--moe-capacity-factor must be 0 (dropless) or more, got -0.5"),
    (
        {"moe_eval_capacity_factor": float("inf")},
        "--moe-eval-capacity-factor must be 0 (dropless) or more, got inf",
    ),
    ({"moe_min_capacity": 0}, "--moe-min-capacity must be at least 1, got 0"),
    ({"no_moe_decoder": "yes"}, "--no-moe-decoder must be of type bool, got 'yes'"),
    ({"scale_fc": True}, "--scale-fc cannot be combined with MoE layers (--moe-freq 0 = dense), got True"),
    ({"base_layers": 1}, "--base-layers cannot be combined with MoE layers"),
    ({"quant_noise_pq": 0.1}, "--quant-noise-pq cannot be combined with MoE layers"),
    ({"quant_noise_scalar": 0.1}, "--quant-noise-scalar cannot be combined with MoE layers"),
    ({"decoder_layers_to_keep": "0,2"}, "--decoder-layers-to-keep cannot be combined with MoE layers"),
]


@pytest.mark.parametrize(
    "flags, message", BAD, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_a_bad_value_is_refused_with_one_line(flags: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        language_model(**flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["xmoe_transformer", "xmoe_transformer_tiny"])
@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"moe_router": "best"},
            UNKNOWN,
        ),
        ({"moe_threshold": 1.5}, "--moe-threshold must be in [0, 1], got 1.5"),
    ],
)
def test_what_a_checkpoint_or_hydra_brings_is_checked(arch: str, flags: dict, message: str) -> None:
    """fairseq merges it with the dataclass first if the architecture is named like the model."""
    model = {"_name": arch, "encoder_embed_dim": 32, "encoder_layers": 2, "decoder_layers": 2}
    built = build_model(OmegaConf.create({"model": model}).model, task(), from_checkpoint=True)
    assert built.decoder.layers[0].embed_dim == 32
    with pytest.raises(ValueError) as error:
        build_model(OmegaConf.create({"model": model | flags}).model, task(), from_checkpoint=True)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "name, hint",
    [
        ("moe_treshold", "; did you mean moe_threshold?"),
        ("moe_loss_coeff", "; of a criterion: +criterion.moe_loss_coeff"),
    ],
)
def test_a_name_that_hydra_adds_is_a_setting(name: str, hint: str) -> None:
    """With a sized architecture fairseq merges nothing, and `+` takes any name."""
    model = {"_name": "xmoe_transformer_tiny", "encoder_layers": 2, "decoder_layers": 2, name: 0.5}
    with pytest.raises(FlagError) as error:
        build_model(OmegaConf.create({"model": model}).model, task(), from_checkpoint=True)
    assert str(error.value) == f"+model.{name}: the model has no setting {name}{hint}"


def test_a_dense_model_ignores_what_concerns_experts_only() -> None:
    language_model(moe_freq=0, moe_ffn_split=7, quant_noise_pq=0.1)


def test_each_side_is_checked_by_its_own_sizes() -> None:
    with pytest.raises(ValueError, match="--moe-ffn-split must divide --encoder-ffn-embed-dim 50, got 4"):
        translation_model(encoder_ffn_embed_dim=50, decoder_ffn_embed_dim=48, moe_ffn_split=4)
    translation_model(
        encoder_ffn_embed_dim=50, decoder_ffn_embed_dim=48, moe_ffn_split=4, no_moe_encoder=True
    )


def test_experts_may_choose_tokens_in_the_encoder() -> None:
    with pytest.raises(ValueError, match="--moe-router expert_choice cannot be used in a decoder"):
        translation_model(moe_router="expert_choice")
    with pytest.raises(ValueError, match="must be at most --moe-num-experts 8, got 9"):
        translation_model(moe_router="expert_choice", no_moe_decoder=True, moe_topk=9)
    model = translation_model(moe_router="expert_choice", no_moe_decoder=True, moe_topk=3)
    assert model.encoder.layers[1].moe.router.experts_per_token == 3


def test_defaults_leave_room_for_shared_experts() -> None:
    flags = {"moe_ffn_split": 4, "moe_shared_experts": 1}
    models = [translation_model(moe_router=name, **flags) for name in ("relu", "topany")]
    relu, topany = (moe_layers(model)[0].router for model in models)
    assert relu.sparsity.target == 3 and topany.max_experts_per_token == 7


def test_defaults() -> None:
    config = read_moe_config(Namespace(), ())
    assert max_experts_per_token(config) == 8
    assert experts_per_token(config) == 4
    shared = read_moe_config(Namespace(moe_shared_experts=1), ())
    assert (max_experts_per_token(shared), experts_per_token(shared)) == (7, 3)  # FLOPs as without
    many = read_moe_config(Namespace(moe_shared_experts=9), ())
    assert (max_experts_per_token(many), experts_per_token(many)) == (1, 1)
    assert max_experts_per_token(read_moe_config(Namespace(moe_max_experts_per_token=0), ())) == 0
    assert read_moe_config(OmegaConf.create({"moe_threshold": 1}), ()).moe_threshold == 1


def test_every_flag_has_a_help_text() -> None:
    for field in fields(MoEConfig):
        assert field.name == "_name" or field.metadata["help"]


def test_the_flat_configuration_has_every_flag_of_fairseqs_transformer() -> None:
    def options(add: object) -> set[str]:
        parser = ArgumentParser()
        add(parser)
        return {option for action in parser._actions for option in action.option_strings}

    ours = options(
        lambda parser: gen_parser_from_dataclass(parser, XMoETransformerConfig(), delete_default=True)
    )
    assert options(TransformerModel.add_args) <= ours
    assert options(XMoETransformerModel.add_args) == ours


def test_a_configuration_is_completed_from_the_task_and_from_other_fields() -> None:
    given = OmegaConf.create({"_name": "xmoe_transformer", "encoder_embed_dim": 64})
    args = complete_namespace(given, XMoETransformerConfig, task())
    assert (args.decoder_embed_dim, args.decoder_output_dim, args.decoder_ffn_embed_dim) == (64, 64, 2048)
    args = complete_namespace(Namespace(), XMoETransformerLanguageModelConfig, task())
    assert args.tokens_per_sample == 64
    assert args.moe_router == "threshold"


@pytest.mark.parametrize(
    "arch, layers, width, ffn",
    [
        ("xmoe_transformer_lm_tiny", 2, 64, 256),
        ("xmoe_transformer_lm_gpt2_small", 12, 768, 3072),
        ("xmoe_transformer_lm_gpt2_medium", 24, 1024, 4096),
        ("xmoe_transformer_tiny", 2, 64, 64),
        ("xmoe_transformer_iwslt_de_en", 6, 512, 1024),
        ("xmoe_transformer_wmt_en_de", 6, 512, 2048),
        ("xmoe_transformer_wmt_en_de_big", 6, 1024, 4096),
    ],
)
def test_architectures_have_the_sizes_of_their_names(arch: str, layers: int, width: int, ffn: int) -> None:
    args = Namespace()
    ARCH_CONFIG_REGISTRY[arch](args)
    assert (args.decoder_layers, args.decoder_embed_dim, args.decoder_ffn_embed_dim) == (layers, width, ffn)
