"""A wrong call ends in one line, with the name that was meant."""

import re
from pathlib import Path

import pytest
from commands import PLUGIN, run
from fairseq import options
from fairseq.data import data_utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import score
from omegaconf import MissingMandatoryValue, OmegaConf

from xmoe_fairseq.convert.convert_command import argument_parser
from xmoe_fairseq_compat.errors import FlagError, UserError, one_line
from xmoe_fairseq_compat.usage import hint, hint_of_flags

TRAIN = ("data", "--arch", "transformer_tiny", "--batch-size", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*TRAIN, "--share-all-embedings"),
            "unrecognized arguments: --share-all-embedings; did you mean --share-all-embeddings?",
        ),
        (
            (*TRAIN, "--moe-threshold=0.3"),
            "unrecognized arguments: --moe-threshold=0.3; the --moe-* flags come with --user-dir "
            "xmoe_fairseq and --arch xmoe_transformer",
        ),
        (
            (*TRAIN, "--qqq"),
            "unrecognized arguments: --qqq; --help lists the flags of this --task, --arch and the like",
        ),
        (
            (*TRAIN, "--task", "translatoin"),
            "argument --task: there is no 'translatoin'; did you mean translation",
        ),
        ((*TRAIN, "--optimizer", "adm"), "argument --optimizer: there is no 'adm'; choose from adadelta, "),
        ((*TRAIN, "--lr", "x"), "argument --lr: not a number or a list such as 1 or [1,2]: 'x'"),
        (
            (*TRAIN, "--update-freq", "nan"),
            "argument --update-freq: not a number or a list such as 1 or [1,2]",
        ),
        (TRAIN[1:], "the following arguments are required: data"),
    ],
)
def test_a_wrong_call(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        options.parse_args_and_arch(options.get_training_parser(), list(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and f": error: {message}" in line


@pytest.mark.parametrize("order", ["-1", "0", "5"])
def test_order_of_bleu(order: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        score.get_parser().parse_args(["-s", "x", "-r", "y", "--order", order])
    assert f"argument -o/--order: there is no {order}; choose from 1, 2, 3, 4" in capsys.readouterr().err


def test_settings_that_another_part_does_not_have() -> None:
    arguments = ["data", "--task", "masked_lm", "--arch", "transformer_lm", "--batch-size", "1"]
    parsed = options.parse_args_and_arch(options.get_training_parser(), arguments)
    with pytest.raises(UserError) as error:
        convert_namespace_to_omegaconf(parsed)
    assert re.fullmatch("the model takes --[a-z-]+ from the task, and this task has none", str(error.value))


def test_a_required_setting_is_named() -> None:
    config = OmegaConf.structured(SentencepieceConfig())
    with pytest.raises(MissingMandatoryValue) as error:
        config.sentencepiece_model  # noqa: B018
    assert one_line(error.value) == "--sentencepiece-model must be given"


def test_a_wrong_call_of_xmoe_convert(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["dense.pt", "sparse.pt", "--calibration", "data"])
    wanted = "xmoe-convert: error: the following arguments are required: --split\n"
    assert capsys.readouterr().err == wanted


def test_names_of_the_plugin() -> None:
    stock = [*"abcdefghijklmnop", "transformer"]
    assert hint("xmoe_transformer", stock) == "; it comes with --user-dir xmoe_fairseq"
    assert hint("xmoe_transfomer", [*stock, "xmoe_transformer"]).startswith("; did you mean xmoe_transformer")
    assert hint("qqq", stock) == "; --help lists what there is"


HYDRA = ("model=transformer_lm", "criterion=cross_entropy", "optimizer=adam", "lr_scheduler=fixed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("task=translatoin",), "task=translatoin: there is no 'translatoin'; did you mean translation"),
        (("task=translation", "task.nosuch=1"), "Could not override 'task.nosuch'.; To append"),
        (
            ("task=language_modeling", "optimization.max_update=x"),
            "Value 'x' of type 'str' could not be conv",
        ),
        (("task=language_modeling", "model.activation_fn=${x}"), "Interpolation key 'x' not found"),
        (("task=language_modeling", "optimization.lr=[nan]"), "--lr must be in [0, 10^6), got [nan]"),
        (("task=language_modeling",), "Must specify batch size either with --max-tokens or --batch-size"),
        (("task=language_modeling", "dataset.batch_size=2"), "the folder of binarised data must be given"),
        (("task=language_modeling", "dataset.batch_size=2", "task.data=/nowhere"), "/nowhere does not exist"),
        (("--bem",), "unrecognized arguments: --bem"),
        (("task=translation",), "--arch must be a model that translates with --task translation"),
        (
            ("task=language_modeling", "common.user_dir=/nowhere"),
            "--user-dir must be a folder or an installed",
        ),
    ],
)
def test_hydra(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """Errors of hydra, of the settings, of names and of folders."""
    output = run("fairseq-hydra-train", *HYDRA, *arguments, f"hydra.run.dir={tmp_path}", succeeds=False)
    assert "Traceback" not in output and "Error executing job" not in output
    assert output.splitlines()[-1].startswith("fairseq-hydra-train: error: ") and message in output


def test_hydra_with_a_model_of_the_plugin(tmp_path: Path) -> None:
    given = (
        "task=language_modeling",
        *HYDRA[1:],
        "+model._name=xmoe_transformer_lm",
        f"hydra.run.dir={tmp_path}",
    )
    output = run("fairseq-hydra-train", *given, succeeds=False)
    assert output.endswith("there is no model 'xmoe_transformer_lm'; it comes with --user-dir xmoe_fairseq\n")
    given += (f"common.user_dir={PLUGIN[1]}", "+model.moe_threshold=3", "+model.moe_treshold=3")
    output = run("fairseq-hydra-train", *given, succeeds=False)
    assert "error: Key 'moe_treshold' not in 'XMoETransformerLanguageModelConfig'" in output


def test_a_misspelt_remove_bpe() -> None:
    with pytest.raises(FlagError, match=r"^--remove-bpe .* must be one of .*, got sentencpiece$"):
        data_utils.post_process("\u2581a b", "sentencpiece")
    assert data_utils.post_process("\u2581a b", "sentencepiece") == "ab"


def test_a_flag_of_the_model_for_a_command_that_opens_a_checkpoint() -> None:
    """--moe-threshold 0.5 is no flag of fairseq-generate, and --arch neither."""
    known = list(options.get_generation_parser()._option_string_actions)
    advice = "changed with --model-overrides \"{'moe_threshold': ...}\""
    assert hint_of_flags(["--moe-threshold"], known).endswith(advice)
