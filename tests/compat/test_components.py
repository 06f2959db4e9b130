"""What a checkpoint may name, and what is said of one that names something else."""

import inspect
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from commands import run
from fairseq import checkpoint_utils, criterions
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from hostile import Change, checkpoint

from xmoe_fairseq_compat import components
from xmoe_fairseq_compat.errors import CheckpointError, FlagError


def opened(path: Path, **overrides: Any) -> Any:
    return checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides=overrides)


def refused(path: Path, **overrides: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        opened(path, **overrides)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def naming(group: str, value: Any) -> Change:
    return lambda state: state["cfg"].update({group: value})


def test_a_checkpoint_of_text_opens(tmp_path: Path) -> None:
    (model,), cfg, task = opened(checkpoint(tmp_path))
    assert task.build_criterion(cfg.criterion) and model.decoder.layers


@pytest.mark.parametrize(
    ("group", "value"),
    [
        ("criterion", {"_name": "ctc", "wer_args": "CODE"}),
        ("criterion", "ctc"),
        ("criterion", Namespace(criterion="ctc", wer_args="CODE")),
        ("criterion", {"_name": "composite_loss", "underlying_criterion": "ctc"}),
        ("criterion", {"_name": "label_smoothed_cross_entropy_with_ctc"}),
        ("task", {"_name": "audio_pretraining", "inferred_w2v_config": {"conv_feature_layers": "CODE"}}),
        ("task", {"_name": "language_modeling", "task": "speech_to_text"}),
        ("model", {"_name": "wav2vec2", "conv_feature_layers": "CODE"}),
        ("model", Namespace(arch="xm_transformer", load_pretrained_decoder_from="evil.pt")),
        ("model", {"_name": "s2t_transformer_s"}),
    ],
)
def test_components_that_are_not_for_text_are_refused(group: str, value: Any, tmp_path: Path) -> None:
    """name_components_of_text_only"""
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    if isinstance(value, dict):
        value = {key: code if entry == "CODE" else entry for key, entry in value.items()}
    problem = refused(checkpoint(tmp_path, naming(group, value)))
    assert f"its {group} " in problem and "is none of fairseq's for text" in problem
    assert not trace.exists()


def test_what_somebody_trusts_can_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "TEXT", {name: set(names) for name, names in components.TEXT.items()})
    path = checkpoint(tmp_path, naming("criterion", {"_name": "ctc"}))
    assert "components.allow('criterion', 'ctc')" in refused(path)
    components.allow("criterion", "ctc")
    assert opened(path)


def test_what_the_command_line_names_is_the_users_choice(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, naming("criterion", {"_name": "ctc"}))
    cfg = checkpoint_utils.load_checkpoint_to_cpu(str(path))["cfg"]  # as fairseq-train does, to resume
    components.check_components(path, cfg, {"criterion": "ctc"})
    task = opened(checkpoint(tmp_path))[2]
    path = checkpoint(tmp_path, naming("task", {"_name": "speech_to_text"}))
    assert "its task speech_to_text is none" in refused(path)
    assert checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task)


def test_components_of_a_user_dir_are_allowed(tmp_path: Path) -> None:
    if "of_a_user" not in criterions.CRITERION_REGISTRY:

        @register_criterion("of_a_user")
        class OfAUser(FairseqCriterion):
            pass

    assert opened(checkpoint(tmp_path, naming("criterion", {"_name": "of_a_user"})))


def test_all_that_is_allowed_exists_and_nobody_who_works_with_text_is_locked_out() -> None:
    for group, names in components.TEXT.items():
        assert names <= components.registered(group).keys(), group
    audio = ("speech", "audio", "wav2vec", "hubert", "text_to_speech", "s2t", "benchmark", "transformer_ulm")
    for group, registry in (("task", TASK_REGISTRY), ("model", MODEL_REGISTRY)):
        for name, found in registry.items():
            if found.__module__.startswith("fairseq."):
                text = not any(part in found.__module__ for part in audio) or name == "simul_text_to_text"
                assert text == (name in components.TEXT[group]) or name == "simul_speech_to_text", name
    for arch in ("bart_large", "mbart_large", "transformer_wmt_en_de_big", "transformer_lm_gpt2_small"):
        name = components.model_name("model", arch)
        assert arch in ARCH_MODEL_REGISTRY and name in components.TEXT["model"]


def test_a_model_of_a_user_dir_that_is_missing(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, naming("model", {"_name": "xmoe_unknown"}))
    expected = "no model is known by the name 'xmoe_unknown'; add --user-dir xmoe_fairseq"
    assert refused(path) == f"cannot load checkpoint {path}: {expected}"
    path = checkpoint(tmp_path, naming("model", {"_name": "somebodys"}))
    assert refused(path).endswith("'somebodys'; add the --user-dir that it was trained with")
    assert "its configuration names no model" in refused(checkpoint(tmp_path, naming("model", {})))
    assert "no task is known by the name" in refused(checkpoint(tmp_path, naming("task", {"_name": "t"})))


def test_a_criterion_that_is_not_known(tmp_path: Path) -> None:
    """say_which_criterion_is_unknown"""
    (_,), cfg, task = opened(checkpoint(tmp_path, naming("criterion", {"_name": "moe_unknown"})))
    with pytest.raises(FlagError, match="^no criterion .* 'moe_unknown'; add --user-dir xmoe_fairseq$"):
        task.build_criterion(cfg.criterion)


def test_a_criterion_that_would_write_a_file(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    criterion = {"_name": "sentence_ranking", "save_predictions": str(trace)}
    path = checkpoint(tmp_path, naming("criterion", criterion))
    assert f"its criterion would write to {str(trace)!r}" in refused(path)
    assert not trace.exists()


def test_commands_end_in_one_line(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    ctc = {"_name": "ctc", "wer_args": f"__import__('pathlib').Path({str(trace)!r}).touch()"}
    path = checkpoint(tmp_path, naming("criterion", ctc))
    arguments = (tmp_path / "data", "--task", "language_modeling", "--path", path, "--cpu", "--batch-size", 2)
    output = run("fairseq-validate", *arguments, succeeds=False)
    assert output.splitlines()[-1].startswith("fairseq-validate: error: cannot load checkpoint")
    assert "Traceback" not in output and not trace.exists()
    arguments = ("--split", 2, "--calibration", tmp_path / "data", "--finetune-updates", 1)
    output = run("xmoe-convert", path, tmp_path / "sparse.pt", *arguments, succeeds=False)
    assert "its criterion ctc is none of fairseq's" in output
    assert "Traceback" not in output and not trace.exists()


def test_the_tasks_of_a_checkpoint_of_old(tmp_path: Path) -> None:
    def of_old(state: dict[str, Any]) -> None:
        cfg = state["cfg"]
        arguments = {**cfg["model"], **cfg["task"], "arch": "transformer_lm", "task": "language_modeling"}
        state.update(cfg=None, args=Namespace(**arguments, criterion="cross_entropy", optimizer="nag"))

    assert opened(checkpoint(tmp_path, of_old))


def test_the_task_still_hears_that_a_model_is_a_checkpoints(tmp_path: Path) -> None:
    """fairseq leaves out settings that a model does not have (any more) where `from_checkpoint` is named."""
    assert opened(checkpoint(tmp_path, lambda state: state["cfg"]["model"].update(of_another_version=1)))
    for name in components.TEXT["task"]:
        patched = getattr(TASK_REGISTRY[name].build_model, "__module__", "").startswith("xmoe_fairseq_compat")
        assert (
            not patched or "from_checkpoint" in inspect.getfullargspec(TASK_REGISTRY[name].build_model).args
        )
