"""What breaks a rule of flag_rules.py is refused, wherever it comes from, in a line that names it."""

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from commands import run
from fairseq import options
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, BaseFairseqModel, build_model
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from fairseq.registry import REGISTRIES
from omegaconf import OmegaConf
from toy import language_model, task, translation_model

from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.flag_rules import RUN
from xmoe_fairseq_compat.flags import check
from xmoe_fairseq_compat.settings import as_dict

TRAIN = ("data", "--arch", "transformer_tiny", "--batch-size", "1", "--optimizer", "adam")
LM = ("data", "--task", "language_modeling", "--arch", "transformer_lm", "--batch-size", "1")
SIZE = "must be a whole number in [1, 2^20]"
POSITIVE = "must be a whole number in [1, 2^63)"
OR_ZERO = "must be a whole number in [0, 2^63)"
BETAS = "must be two numbers in [0, 1), such as (0.9, 0.98)"

NOT_HYDRAS = (
    "must not hold ${ (which stands for another setting), nor a backslash at its end or before a quote"
)


def parse(*arguments: str, parser: Any = options.get_training_parser) -> Namespace:
    return options.parse_args_and_arch(parser(), list(arguments))


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--lr", "-1", "must be in [0, 10^6)"),
        ("--lr", "", "must be in [0, 10^6)"),
        ("--lr", "[0.1, 1e999]", "must be in [0, 10^6)"),
        ("--adam-betas", "(1, 2)", BETAS),
        ("--adam-betas", "(0.9,)", BETAS),
        ("--adam-betas", "0.9", BETAS),
        ("--adam-betas", "x", BETAS),
        ("--clip-norm", "-1", "must be a number, 0 or more"),
        ("--clip-norm", "nan", "must be a number, 0 or more"),
        ("--update-freq", "0", POSITIVE),
        ("--max-tokens", "0", POSITIVE),
        ("--batch-size", "-2", POSITIVE),
        ("--max-source-positions", "-1", POSITIVE),
        ("--max-target-positions", "0", POSITIVE),
        ("--max-tokens", "100000000000000000000", POSITIVE),
        ("--max-update", "-5", OR_ZERO),
        ("--max-epoch", "-5", OR_ZERO),
        ("--num-workers", "-1", OR_ZERO),
        ("--seed", "-1", "must be in [0, 2^32)"),
        ("--seed", "4294967296", "must be in [0, 2^32)"),
        ("--ema-decay", "1", "must be in [0, 1)"),
        ("--model-parallel-size", "2", "must be 1 without Megatron-LM"),
        ("--patience", "0", "must be -1 (off) or at least 1"),
        ("--save-dir", "${a}", NOT_HYDRAS),
        ("--train-subset", "a\\", NOT_HYDRAS),
        ("--train-subset", "a\\'b", NOT_HYDRAS),
        ("--optimizer-overrides", "{[]: 1}", "must be a dictionary such as \"{'lr': 0.1}\""),
        ("--adam-betas", "{[]: 1}", "must be two numbers in [0, 1), such as (0.9, 0.98)"),
        ("--optimizer-overrides", "x", "must be a dictionary such as \"{'lr': 0.1}\""),
        ("--eval-bleu-args", "x", "must be a dictionary such as '{\"beam\": 4}'"),
    ],
)
def test_nonsense_on_the_command_line(flag: str, value: str, rule: str) -> None:
    with pytest.raises(FlagError) as error:
        parse(*TRAIN, flag, value)
    assert str(error.value).startswith(f"{flag} {rule}, got ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "2"), "in [0, 1), got 2.0"),
        (("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "-5"), "--warmup-updates must be a whole"),
        (("--lr-scheduler", "cosine", "--lr", "0.1", "--min-lr", "1"), "must be in [0, --lr [0.1]), got 1.0"),
        (
            ("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "0"),
            "--warmup-updates must be at least 1 with --lr-scheduler inverse_sqrt, got 0",
        ),
    ],
)
def test_nonsense_for_what_was_chosen(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(FlagError) as error:
        parse(*TRAIN, *more)
    assert message in str(error.value)


def test_detokenizer() -> None:
    with pytest.raises(FlagError, match="^--eval-bleu-detok must be one of .*space.*, got x$"):
        parse(*TRAIN, "--eval-bleu", "--eval-bleu-detok", "x")
    parse(*TRAIN, "--eval-bleu-detok", "x")


def test_strings_that_look_dangerous() -> None:
    assert parse(*TRAIN, "--wandb-project", "it's $5 a\\b").wandb_project == "it's $5 a\\b"


def test_tokens_per_sample() -> None:
    with pytest.raises(FlagError, match="^--tokens-per-sample must be a whole number .*, got 0$"):
        parse(*LM, "--tokens-per-sample", "0")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--beam", "0", f"--beam {POSITIVE}, got 0"),
        ("--nbest", "6", "--nbest must be at most --beam 5, got 6"),
        ("--lenpen", "nan", "--lenpen must be in (-100, 100), got nan"),
        ("--temperature", "0", "--temperature must be above 0, got 0.0"),
        ("--sampling-topp", "1.5", "--sampling-topp must be -1 (off) or in (0, 1], got 1.5"),
        ("--diverse-beam-groups", "2", "--diverse-beam-groups must divide --beam 5, got 2"),
        ("--shard-id", "1", "--shard-id must be below --num-shards 1, got 1"),
    ],
)
def test_nonsense_for_generation(flag: str, value: str, message: str) -> None:
    with pytest.raises(FlagError) as error:
        parse("data", flag, value, parser=options.get_generation_parser)
    assert str(error.value) == message


def test_all_defaults_keep_the_rules() -> None:
    """Of every command, optimizer, scheduler and criterion."""
    parse("data", parser=options.get_generation_parser)
    parse("data", parser=options.get_interactive_generation_parser)
    parse("data", parser=options.get_eval_lm_parser)
    check(vars(options.get_preprocessing_parser().parse_args([])), RUN)
    parse(*LM)
    for group in ("optimizer", "lr_scheduler", "criterion"):
        for config in REGISTRIES[group]["dataclass_registry"].values():
            check(as_dict(config()), RUN)


def test_nonsense_for_preprocessing(tmp_path: Path) -> None:
    (tmp_path / "some").write_text("text\n")
    preprocess = (
        "fairseq-preprocess",
        "--only-source",
        "--trainpref",
        tmp_path / "some",
        "--destdir",
        tmp_path,
    )
    output = run(*preprocess, "--workers", 0, succeeds=False)
    assert output == f"fairseq-preprocess: error: --workers {POSITIVE}, got 0\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"decoder_attention_heads": 3},
            "--decoder-attention-heads must divide --decoder-embed-dim 32, got 3",
        ),
        ({"decoder_attention_heads": 0}, f"--decoder-attention-heads {SIZE}, got 0"),
        ({"decoder_embed_dim": 10**7}, f"--decoder-embed-dim {SIZE}, got 10000000"),
        ({"decoder_embed_dim": -8}, f"--decoder-embed-dim {SIZE}, got -8"),
        ({"decoder_ffn_embed_dim": 0}, f"--decoder-ffn-embed-dim {SIZE}, got 0"),
        ({"decoder_layers": 0, "moe_freq": 0}, f"--decoder-layers {SIZE}, got 0"),
        ({"decoder_layers": 2.5}, f"--decoder-layers {SIZE}, got 2.5"),
        ({"max_target_positions": -1}, f"--max-target-positions {POSITIVE}, got -1"),
        ({"dropout": 2.0}, "--dropout must be in [0, 1), got 2.0"),
        ({"dropout": float("nan")}, "--dropout must be in [0, 1), got nan"),
        ({"dropout": "much"}, "--dropout must be in [0, 1), got much"),
        ({"attention_dropout": -1.0}, "--attention-dropout must be in [0, 1), got -1.0"),
        ({"activation_dropout": 2.0}, "--activation-dropout must be in [0, 1), got 2.0"),
        ({"decoder_layerdrop": 3}, "--decoder-layerdrop must be in [0, 1), got 3"),
        (
            {"decoder_embed_dim": 2},
            "--decoder-embed-dim must be at least 4 without --decoder-learned-pos, got 2",
        ),
        (
            {"adaptive_input_cutoff": "x"},
            "--adaptive-input-cutoff must be whole numbers, such as 20000,60000, got x",
        ),
        (
            {"share_decoder_input_output_embed": True, "decoder_output_dim": 16},
            "--share-decoder-input-output-embed needs --decoder-output-dim 16 to be the width of the "
            "embedding, got True",
        ),
    ],
)
@pytest.mark.parametrize("model", [language_model, translation_model])
def test_nonsense_for_a_model(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError) as error:
        model(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["transformer_lm", "transformer_tiny"])
def test_dense_models_of_a_checkpoint(name: str) -> None:
    """As --model-overrides leaves them."""
    model = {"_name": name, "decoder_attention_heads": 3, "decoder_embed_dim": 32}
    with pytest.raises(
        FlagError, match="--decoder-attention-heads must divide --decoder-embed-dim 32, got 3"
    ):
        build_model(OmegaConf.create({"model": model}).model, task(), from_checkpoint=True)


def test_a_nested_configuration() -> None:
    cfg = copy.deepcopy(TransformerConfig())  # its parts are one for all of them
    cfg.encoder.attention_heads = 7
    with pytest.raises(
        FlagError, match="--encoder-attention-heads must divide --encoder-embed-dim 512, got 7"
    ):
        TransformerModelBase.build_model(cfg, task())


def test_a_users_flag_may_have_the_name_of_another_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq-generate's --temperature must be above 0; what a model's means is its own affair."""

    class Model(BaseFairseqModel):
        @staticmethod
        def add_args(parser: Any) -> None:
            parser.add_argument("--temperature", type=float)

    monkeypatch.setitem(ARCH_MODEL_REGISTRY, "own", Model)
    monkeypatch.setitem(ARCH_CONFIG_REGISTRY, "own", lambda args: None)
    arguments = ["data", "--batch-size", "1", "--task", "translation", "--arch", "own", "--temperature", "0"]
    assert options.parse_args_and_arch(options.get_training_parser(), arguments).temperature == 0
