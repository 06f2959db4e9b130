"""Which --task, --arch and --criterion go together."""

import importlib
import pickle

import pytest
from fairseq import options
from fairseq.models import ARCH_MODEL_REGISTRY, BaseFairseqModel, FairseqLanguageModel
from torch import Tensor
from toy import task  # noqa: F401  (registers this package's models)

from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.names import check_names

LM, MT = "language_modeling", "translation"
NOT_A_LANGUAGE_MODEL = (
    "--arch must be a language model (such as transformer_lm) with --task language_modeling"
)
NO_TRANSLATOR = "--arch must be a model that translates with --task translation, got the language model"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((LM, "xmoe_transformer_tiny"), f"{NOT_A_LANGUAGE_MODEL}, got xmoe_transformer_tiny"),
        ((LM, "transformer"), f"{NOT_A_LANGUAGE_MODEL}, got transformer"),
        ((MT, "transformer_lm"), f"{NO_TRANSLATOR} transformer_lm"),
        ((MT, "xmoe_transformer_lm"), f"{NO_TRANSLATOR} xmoe_transformer_lm"),
        (
            (LM, "transformer_lm", "--criterion", "label_smoothed_cross_entropy_with_alignment"),
            "--criterion must be one for tokens with --task language_modeling, such as cross_entropy, "
            "got label_smoothed_cross_entropy_with_alignment",
        ),
        (
            (MT, "transformer", "--criterion", "hubert"),
            "--criterion must be one for tokens with --task translation, such as cross_entropy, got hubert",
        ),
    ],
)
def test_what_does_not_go_together(names: tuple[str, ...], message: str) -> None:
    arguments = ["data", "--batch-size", "1", "--task", names[0], "--arch", *names[1:]]
    with pytest.raises(FlagError) as error:
        options.parse_args_and_arch(options.get_training_parser(), arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("command", ["train", "validate", "eval_lm", "interactive"])
def test_spawned_ranks_find_what_they_run(command: str) -> None:
    """fairseq spawns a process for each GPU, which gets the command's main by its name."""
    main = importlib.import_module(f"fairseq_cli.{command}").main
    assert pickle.loads(pickle.dumps(main)) is main


def test_what_goes_together() -> None:
    check_names(LM, "xmoe_transformer_lm_tiny", "moe_cross_entropy")
    check_names(MT, "xmoe_transformer", "label_smoothed_cross_entropy_with_alignment")
    check_names("masked_lm", "roberta", "masked_lm")
    check_names("audio_pretraining", "wav2vec2", "wav2vec")
    check_names(None, None, None)
    check_names(LM, "of_a_user", None)


def test_models_of_a_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that translates by itself, and a language model that is built otherwise."""

    class Translates(FairseqLanguageModel):
        def forward(self, src_tokens: Tensor, src_lengths: Tensor, prev_output_tokens: Tensor) -> None: ...

    class Predicts(BaseFairseqModel):
        supported_targets = ("future",)

    monkeypatch.setitem(ARCH_MODEL_REGISTRY, "translates", Translates)
    monkeypatch.setitem(ARCH_MODEL_REGISTRY, "predicts", Predicts)
    check_names(MT, "translates", None)
    check_names(LM, "predicts", None)
