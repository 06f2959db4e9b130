"""What fairseq's Python interface (from_pretrained, translate, sample) needs."""

from __future__ import annotations

from typing import Any

from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.override_rules import did_you_mean
from xmoe_fairseq_compat.registry import patch, wrap

# Besides the settings of a GenerationConfig: arguments of `generate` itself, and what tasks read.
ARGUMENTS = {"skip_invalid_size_inputs", "inference_step_args", "prefix_allowed_tokens_fn"}
OF_TASKS = {"keep_inference_langtok"}


@patch("fairseq.file_utils")
def name_the_folder_that_is_not_there(module: Any) -> None:
    """Every torch: from_pretrained of a misspelt folder ends in a TypeError on None."""

    @wrap(module, "load_archive_file")
    def load_archive_file(plain: Any, archive_file: str) -> str:
        folder: str | None = plain(archive_file)
        if folder is None:
            raise FlagError(f"{archive_file} does not exist: from_pretrained takes folders and addresses")
        return folder


@patch("fairseq.hub_utils")
def refuse_settings_of_nothing(module: Any) -> None:
    """Every torch: translate() and sample() take any name for a setting, and pass over a misspelt one."""
    kind = module.GeneratorHubInterface

    @wrap(kind, "generate")
    def generate(
        plain: Any, self: Any, tokens: Any, beam: int = 5, verbose: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        known = {*self.cfg.generation, *ARGUMENTS, *OF_TASKS}
        for name in kwargs:
            if name not in known:
                raise FlagError(f"generation has no setting {name}{did_you_mean(name, known)}")
        if kwargs.get("replace_unk") is not None:
            raise FlagError("replace_unk is for fairseq-generate and fairseq-interactive: leave it out")
        if verbose and kwargs.get("print_alignment") == "soft":
            raise FlagError(
                "print_alignment='soft' cannot be printed: leave out verbose, read hypo['alignment']"
            )
        return plain(self, tokens, beam, verbose, *args, **kwargs)


@patch("fairseq.hub_utils")
def check_before_a_result_is_used(module: Any) -> None:
    """Every torch: what a model learns late (a GPU's host of a NaN) is asked for by no one in translate()."""

    @wrap(module.GeneratorHubInterface, "generate")
    def generate(plain: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            found = plain(self, *args, **kwargs)
        except AssertionError:  # as a search of what is not finite ends
            check(self.models)
            raise
        check(self.models)
        return found

    def check(models: Any) -> None:
        for each in plugins.checks:
            for model in models:
                each(model)
