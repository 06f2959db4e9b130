"""Whether the --task, --arch and --criterion that a user names go together."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.registry import patch, wrap
from xmoe_fairseq_compat.settings import when_parsed
from xmoe_fairseq_compat.usage import hint

# fairseq's criterions for a sequence of tokens; the others want speech, classes, masks or lengths.
OF_TOKENS = {"cross_entropy", "label_smoothed_cross_entropy", "adaptive_loss", "composite_loss", "model"}
OF_TOKENS |= {"vocab_parallel_cross_entropy"}
OF_TRANSLATIONS = {
    "label_smoothed_cross_entropy_with_alignment",
    "latency_augmented_label_smoothed_cross_entropy",
}


def check_names(task: Any, arch: Any, criterion: Any) -> None:
    """Raises FlagError for a model that cannot do the task, or a criterion that wants other data. A task or
    criterion that a user adds is left alone, a model with a forward of its own, and a name that is not known
    (yet)."""
    from fairseq.criterions import CRITERION_REGISTRY
    from fairseq.models import ARCH_MODEL_REGISTRY, FairseqLanguageModel
    from fairseq.tasks import TASK_REGISTRY
    from fairseq.tasks.language_modeling import LanguageModelingTask
    from fairseq.tasks.multilingual_translation import MultilingualTranslationTask
    from fairseq.tasks.translation import TranslationTask

    kind, model = TASK_REGISTRY.get(task), ARCH_MODEL_REGISTRY.get(arch)
    if kind is None or model is None:
        return
    is_language_model = issubclass(model, FairseqLanguageModel)
    reads_no_source = model.forward is FairseqLanguageModel.forward
    if reads_no_source and issubclass(kind, (TranslationTask, MultilingualTranslationTask)):
        raise FlagError(
            f"--arch must be a model that translates with --task {task}, got the language model {arch}"
        )
    of_fairseq = model.__module__.startswith("fairseq.")
    says_its_targets = hasattr(model, "supported_targets") and not of_fairseq  # all that the task asks for
    if not (is_language_model or says_its_targets) and issubclass(kind, LanguageModelingTask):
        raise FlagError(
            f"--arch must be a language model (such as transformer_lm) with --task {task}, got {arch}"
        )
    fairseqs = getattr(CRITERION_REGISTRY.get(criterion), "__module__", "").startswith("fairseq.")
    fitting = {LanguageModelingTask: OF_TOKENS, TranslationTask: OF_TOKENS | OF_TRANSLATIONS}.get(kind)
    if fairseqs and fitting and criterion not in fitting:
        raise FlagError(
            f"--criterion must be one for tokens with --task {task}, such as cross_entropy, got {criterion}"
        )


@patch("fairseq.options")
def check_names_on_the_command_line(module: Any) -> None:
    """Every torch: a task and a model that do not go together fail somewhere inside, in as many ways."""

    def see(namespace: Namespace, parser: ArgumentParser) -> None:
        # Else there is no training, the model is a checkpoint's, and fairseq-generate has an --arch of its
        # own, for speech.
        if "--max-update" in parser._option_string_actions and hasattr(namespace, "max_update"):
            check_names(*(getattr(namespace, name, None) for name in ("task", "arch", "criterion")))

    when_parsed(module, see)


def names_of(cfg: Any) -> list[Any]:
    groups = [cfg.get(group) for group in ("task", "model", "criterion")]
    return [getattr(group, "_name", group) for group in groups]


@patch("fairseq_cli.hydra_train")
def check_names_of_hydra(module: Any) -> None:
    """Every torch: as on the command line. References between them are followed here, where names of a
    --user-dir are not known yet."""

    @wrap(module, "_hydra_main")
    def _hydra_main(plain: Any, cfg: Any, **kwargs: Any) -> Any:
        check_names(*names_of(cfg))
        return plain(cfg, **kwargs)


@patch("fairseq_cli.train")
def check_names_of_a_user_dir(module: Any) -> None:
    """Every torch: as on the command line; hydra takes any name for a model, and fails in a KeyError."""

    @wrap(module, "main")
    def main(plain: Any, cfg: Any) -> Any:
        from fairseq.models import ARCH_MODEL_REGISTRY

        module.utils.import_user_module(cfg.common)
        task, arch, criterion = names_of(cfg)
        if arch not in ARCH_MODEL_REGISTRY:
            raise FlagError(f"there is no model {arch!r}{hint(str(arch), ARCH_MODEL_REGISTRY)}")
        check_names(task, arch, criterion)
        return plain(cfg)
