"""Which of fairseq's components a checkpoint may name: those of text, and those that the user brought.

A command builds what a checkpoint's configuration names. So that a file from elsewhere cannot choose among
all that fairseq can do (open audio files, load other models, run their tools), the rest is refused until
somebody who knows the component allows it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from xmoe_fairseq_compat.errors import CheckpointError, FlagError
from xmoe_fairseq_compat.plugins import plugin_of
from xmoe_fairseq_compat.registry import patch, wrap

# By the group of the configuration; models by their name, which all their architectures share.
TEXT: dict[str, set[str]] = {
    "task": {
        "cross_lingual_lm", "denoising", "language_modeling", "legacy_masked_lm", "masked_lm",
        "multilingual_denoising", "multilingual_language_modeling", "multilingual_masked_lm",
        "multilingual_translation", "online_backtranslation", "semisupervised_translation",
        "sentence_prediction", "sentence_prediction_adapters", "sentence_ranking", "simul_text_to_text",
        "translation", "translation_from_pretrained_bart", "translation_from_pretrained_xlm",
        "translation_lev", "translation_multi_simple_epoch",
    },
    "model": {
        "bart", "camembert", "cmlm_transformer", "fconv", "fconv_lm", "fconv_self_att", "gottbert", "hf_gpt2",
        "insertion_transformer", "iterative_nonautoregressive_transformer", "levenshtein_transformer",
        "lightconv", "lightconv_lm", "lstm", "lstm_lm", "masked_lm", "model_parallel_roberta",
        "model_parallel_transformer", "model_parallel_transformer_lm", "multilingual_transformer",
        "nacrf_transformer", "nonautoregressive_transformer", "pipeline_parallel_transformer", "roberta",
        "roberta_enc_dec", "transformer", "transformer_align", "transformer_from_pretrained_xlm",
        "transformer_lm", "xlmr", "xmod",
    },
    "criterion": {
        "adaptive_loss", "composite_loss", "cross_entropy", "label_smoothed_cross_entropy",
        "label_smoothed_cross_entropy_with_alignment", "latency_augmented_label_smoothed_cross_entropy",
        "legacy_masked_lm_loss", "masked_lm", "model", "nat_loss", "sentence_prediction",
        "sentence_prediction_adapters", "sentence_ranking", "vocab_parallel_cross_entropy",
    },
    "tokenizer": {"moses", "nltk", "space"},
    "bpe": {
        "bert", "byte_bpe", "bytes", "characters", "fastbpe", "gpt2", "hf_byte_bpe", "sentencepiece",
        "subword_nmt",
    },
    "scoring": {"bert_score", "bleu", "chrf", "meteor", "sacrebleu", "wer"},
    "optimizer": {
        "adadelta", "adafactor", "adagrad", "adam", "adamax", "composite", "cpu_adam", "lamb", "nag", "sgd",
    },
    "lr_scheduler": {
        "cosine", "fixed", "inverse_sqrt", "manual", "pass_through", "polynomial_decay",
        "reduce_lr_on_plateau", "step", "tri_stage", "triangular",
    },
}  # fmt: skip
BUILT = ("task", "model")  # always, when a checkpoint is opened: their names must be known
# Where a component names another, or a file that it would write.
ALSO = {("criterion", "underlying_criterion"): "criterion", ("task", "eval_bleu_detok"): "tokenizer"}
WRITES = (("criterion", "save_predictions"),)

_user_gives_task: ContextVar[bool | None] = ContextVar("user_gives_task", default=None)


def allow(group: str, name: str) -> None:
    """Let checkpoints name one more of fairseq's components; for a --user-dir of somebody who trusts it."""
    TEXT[group].add(name)


def check_components(
    path: Any, cfg: Any, overrides: Mapping[str, Any] | None = None, task_is_given: bool = False
) -> None:
    """Raises CheckpointError where a checkpoint's configuration names what it may not, or what is not known.

    Args:
        overrides: of the configuration, on the user's command line: what they name is the user's choice.
        task_is_given: the user's command line names the task, and the checkpoint's is not built.
    """
    given = overrides or {}
    for group in TEXT:
        if not (group == "task" and task_is_given):
            names = _names(_setting(cfg, group), group)
            if not names and group in BUILT:
                problem = f"its configuration names no {group}; name a file that fairseq-train saved"
                raise CheckpointError(path, problem)
            for name in names:
                _check(path, group, name, given)
    for (group, setting), of in ALSO.items():
        for name in _names(_setting(_setting(cfg, group), setting), of):
            _check(path, of, name, given)
    for group, setting in WRITES:
        file = _setting(_setting(cfg, group), setting)
        if file and given.get(setting) != file:
            raise CheckpointError(path, f"its {group} would write to {str(file)[:200]!r} ({setting})")


def _setting(cfg: Any, name: str) -> Any:
    if isinstance(cfg, Namespace):
        return getattr(cfg, name, None)
    return cfg.get(name) if isinstance(cfg, Mapping) else None


def _names(cfg: Any, group: str) -> list[str]:
    """What fairseq may take for a component's name, in the several forms of a configuration."""
    if isinstance(cfg, str):
        return [cfg]
    found = [_setting(cfg, name) for name in ("_name", group, *(["arch"] if group == "model" else []))]
    return [name for name in found if isinstance(name, str) and name]


def _check(path: Any, group: str, name: str, given: Mapping[str, Any]) -> None:
    if name in (given.get(group), given.get("arch") if group == "model" else None):
        return
    found = registered(group).get(name)
    if found is None and group in BUILT:
        raise CheckpointError(path, unknown(group, name))
    of_fairseq = getattr(found, "__module__", "").partition(".")[0] == "fairseq"
    if of_fairseq and (kind := model_name(group, name)) not in TEXT[group]:
        raise CheckpointError(
            path, f"its {group} {name} is none of fairseq's for text, and it may name no others;"
            " if you trust it, add a --user-dir that calls"
            f" xmoe_fairseq_compat.components.allow({group!r}, {kind!r})",
        )  # fmt: skip


def unknown(group: str, name: str) -> str:
    plugin = plugin_of(name)
    missing = f"--user-dir {plugin.value}" if plugin else "the --user-dir that it was trained with"
    return f"no {group} is known by the name {name[:60]!r}; add {missing}"


def model_name(group: str, name: str) -> str:
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY

    return str(ARCH_MODEL_NAME_REGISTRY.get(name, name)) if group == "model" else name


def registered(group: str) -> dict[str, Any]:
    """The classes that may be named in a group."""
    from fairseq import models, registry, tasks

    if group == "task":
        return dict(tasks.TASK_REGISTRY)
    if group == "model":
        return {**models.ARCH_MODEL_REGISTRY, **models.MODEL_REGISTRY}
    return dict(registry.REGISTRIES[group]["registry"]) if group in registry.REGISTRIES else {}


@patch("fairseq.checkpoint_utils")
def name_components_of_text_only(module: Any) -> None:
    """Every torch: a checkpoint may name any of fairseq's components, which its configuration then steers.

    And one whose model is not known, because --user-dir is missing, ends in KeyError: "'_name'".
    """

    @wrap(module, "load_checkpoint_to_cpu")
    def load_checkpoint_to_cpu(
        plain: Any, path: Any, arg_overrides: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        state = plain(path, arg_overrides, *args, **kwargs)
        if _user_gives_task.get() is not None:  # else nothing is built of its configuration
            check_components(path, state.get("cfg"), arg_overrides, bool(_user_gives_task.get()))
        return state

    @wrap(module, "load_model_ensemble_and_task")
    def load_model_ensemble_and_task(
        plain: Any, filenames: Any, arg_overrides: Any = None, task: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        token = _user_gives_task.set(task is not None)
        try:
            return plain(filenames, arg_overrides, task, *args, **kwargs)
        finally:
            _user_gives_task.reset(token)


@patch("fairseq.criterions")
def say_which_criterion_is_unknown(module: Any) -> None:
    """Every torch: fairseq-validate of a checkpoint trained with a criterion of a --user-dir that is missing
    ends in a KeyError."""

    @wrap(module, "build_criterion")
    def build_criterion(plain: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        for name in _names(cfg, "criterion"):
            if name not in module.CRITERION_REGISTRY:
                raise FlagError(unknown("criterion", name))
        return plain(cfg, *args, **kwargs)
