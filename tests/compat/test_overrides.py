"""overrides.py: what --model-overrides and from_pretrained are asked to change is changed, or refused."""

import argparse
import ast
import copy
import functools
from typing import Any

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig, open_dict

import xmoe_fairseq  # noqa: F401  (registers the models)
from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.override_rules import add_newer, check_overrides
from xmoe_fairseq_compat.overrides import Asked, read_overrides


@functools.cache
def config(arch: str = "xmoe_transformer_lm_tiny", task: str = "language_modeling") -> DictConfig:
    """As a checkpoint of a training run holds it."""
    parser = options.get_training_parser()
    flags = ["data", "--arch", arch, "--task", task, "--moe-threshold", "0.5"]
    return convert_namespace_to_omegaconf(
        options.parse_args_and_arch(parser, flags if "moe" in arch else flags[:-2])
    )


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "must be a dictionary of literals, such as"),
        ("{'a'}", "must be a dictionary of literals, such as"),
        ("('a', 'b')", "must be a dictionary of literals, such as"),
        ("__import__('os').getcwd()", "must be a dictionary of literals, such as"),
        ("", "must be a dictionary of literals, such as"),
        ("{5: 6}", "a setting must be named by a string, got 5"),
        ("{'model': {5: 6}}", "a setting must be named by a string, got 5"),
        ("{'beam': 1}", "beam is no setting of a model, but a flag: --beam"),
        ("{'bpe': 'gpt2'}", "bpe is no setting of a model, but a flag: --bpe"),
        ("{'max_len_a': 1}", "max_len_a is no setting of a model, but a flag: --max-len-a"),
    ],
)
def test_the_form_of_overrides(text: str, rule: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(FlagError, match="--model-overrides:? ") as error:
        options.parse_args_and_arch(
            options.get_generation_parser(), ["data", "--path", "x.pt", "--model-overrides", text]
        )
    assert rule in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "{'decoder_layers': '${oc.env:HOME}'}",
        "{'decoder_layers': ['${a}']}",
        "{'model': {'decoder_layers': '${a}'}}",
        "{'decoder_layers': '???'}",
    ],
)
def test_a_reference_is_no_value(text: str) -> None:
    """On the command line, and in Python."""
    with pytest.raises(FlagError, match="decoder_layers must be a value, not a reference"):
        read_overrides(text)
    with pytest.raises(FlagError, match="decoder_layers must be a value, not a reference"):
        Asked(ast.literal_eval(text))


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        ({"moe_treshold": 0.5}, "the model of x.pt has no setting moe_treshold; did you mean moe_threshold?"),
        ({"moe-threshold": 0.5}, "no setting moe-threshold; did you mean moe_threshold?"),
        ({"--moe-threshold": 0.5}, "no setting --moe-threshold; did you mean moe_threshold?"),
        ({"threshold": 0.5}, "no setting threshold; did you mean moe_threshold?"),
        ({"dropuot": 0.1}, "no setting dropuot; did you mean dropout?"),
        ({"": 1}, "no setting "),
        ({"model": {"moe_treshold": 0.5}}, "no setting moe_treshold; did you mean moe_threshold?"),
        ({"max_tokens": 5}, "max_tokens is no setting of a model, but a flag: --max-tokens"),
        ({"--batch-size": 5}, "is no setting of a model, but a flag: --batch-size"),
        ({"model": "transformer_lm"}, "model has settings of its own; give a dictionary"),
        ({"moe_threshold": "abc"}, "moe_threshold must be of type float, got 'abc'"),
        ({"moe_threshold": True}, "moe_threshold must be of type float, got True"),
        ({"moe_threshold": [0.5]}, "moe_threshold must be of type float, got [0.5]"),
        ({"decoder_layers": 2.5}, "decoder_layers must be of type int, got 2.5"),
        ({"decoder_layers": None}, "decoder_layers must have a value, got None"),
        ({"moe_router": None}, "moe_router must have a value, got None"),
        ({"moe_router": 5}, "moe_router must be of type str, got 5"),
        ({"no_moe_decoder": "no"}, "no_moe_decoder must be of type bool, got 'no'"),
        ({"moe_target_experts_per_token": 2}, "moe_target_experts_per_token must be 0 "),
        ({"model": {"moe_target_experts_per_token": 2}}, "moe_target_experts_per_token must be 0 "),
    ],
)
def test_overrides_that_would_do_nothing(overrides: dict[str, Any], rule: str) -> None:
    with pytest.raises(FlagError) as error:
        check_overrides(overrides, config(), "x.pt")
    assert str(error.value).startswith("--model-overrides: ") and rule in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"moe_threshold": 1, "moe_max_experts_per_token": 0},
        {"dropout": 0, "share_decoder_input_output_embed": True, "activation_fn": "gelu"},
        {"model": {"moe_threshold": 0.0}, "task": {"tokens_per_sample": 7}},
        {"data": "elsewhere", "tokens_per_sample": 7, "future_target": True, "max_target_positions": 8},
        {"bpe": "sentencepiece", "sentencepiece_model": "spm.model", "sentencepiece_alpha": 0.5},
        {"task": "language_modeling", "beam": 3},  # from_pretrained: what it returns generates
    ],
)
def test_what_a_checkpoint_knows_is_let_through(overrides: dict[str, Any]) -> None:
    cfg = config()
    check_overrides(overrides, cfg, "x.pt")


def test_what_a_model_has_got_since_can_be_overridden_too() -> None:
    cfg = copy.deepcopy(config())
    for overrides in ({"moe_combine": "ones"}, {"model": {"moe_combine": "ones"}}):
        with open_dict(cfg.model):
            for name in {"moe_combine", "moe_router_args"} & {*cfg.model}:
                del cfg.model[name]
        with pytest.raises(FlagError, match="has no setting moe_combine"):
            check_overrides(overrides, cfg, "x.pt")
        add_newer(overrides, cfg)
        assert cfg.model.moe_combine == "probs" and "moe_router_args" not in cfg.model
        check_overrides(overrides, cfg, "x.pt")


def test_a_stock_models_namespace_is_checked_too() -> None:
    """It would take any name as an attribute."""
    cfg = config("transformer_iwslt_de_en", "translation")
    assert isinstance(cfg.model, argparse.Namespace)
    check_overrides({"encoder_layers": 2, "eval_bleu": False, "relu_dropout": 0.5}, cfg, "x.pt")
    for wrong in ({"encoder_layer": 2}, {"encoder_layers": 2.5}, {"moe_threshold": 0.5}):
        with pytest.raises(FlagError, match="encoder_layers|moe_threshold"):
            check_overrides(wrong, cfg, "x.pt")


def test_validate_hands_over_its_own_flags() -> None:
    """All that were given, of which a model need not know any; what the user asked for is in one of them."""
    given = {"path": "x.pt", "max_tokens": 5, "cpu": True, "model_overrides": "{'dropuot': 1}"}
    assert Asked(given).asked == {"dropuot": 1}
    assert Asked({"path": "x.pt", "max_tokens": 5}).asked == {}
    assert read_overrides(" {'a': (1, 2)}") == {"a": (1, 2)}
