"""What fairseq's tasks need."""

from __future__ import annotations

import copy
import logging
from typing import Any

from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.registry import patch, wrap


@patch("fairseq.tasks.translation_from_pretrained_bart")
def fine_tune_bart(module: Any) -> None:
    """Every torch: translation_from_pretrained_bart reads `args`, which its parent has renamed `cfg`."""
    kind = module.TranslationFromPretrainedBARTTask

    @wrap(kind, "__init__")
    def init(plain: Any, self: Any, args: Any, *dictionaries: Any) -> None:
        if not args.langs:
            raise FlagError("--langs must name the languages of pretraining, such as en_XX,de_DE")
        plain(self, args, *dictionaries)

    kind.args = property(lambda self: self.cfg)


@patch("fairseq.tasks.translation_from_pretrained_bart")
def search_with_bart(module: Any) -> None:
    """Every torch: translation_from_pretrained_bart passes over --sampling, --lm-path and the like."""
    from fairseq.tasks import FairseqTask

    kind = module.TranslationFromPretrainedBARTTask

    @wrap(kind, "build_generator")
    def build_generator(
        plain: Any, self: Any, models: Any, args: Any, seq_gen_cls: Any = None, extra: Any = None, **rest: Any
    ) -> Any:
        if getattr(args, "score_reference", False):
            return plain(self, models, args)
        eos = self.tgt_dict.index(f"[{self.args.target_lang}]")  # how a sentence of this language ends
        rest["extra_gen_cls_kwargs"] = {**(extra or rest.get("extra_gen_cls_kwargs") or {}), "eos": eos}
        generator = FairseqTask.build_generator(self, models, args, seq_gen_cls=seq_gen_cls, **rest)
        generator.search.eos = eos
        return generator


@patch("fairseq.tasks.language_modeling")
def leave_room_for_bos(module: Any) -> None:
    """Every torch: --add-bos-token makes blocks one longer than the positions that are learned: IndexError.

    There a block is one token shorter.
    """
    from fairseq.modules import LearnedPositionalEmbedding

    kind, logger = module.LanguageModelingTask, logging.getLogger(module.__name__)

    # by this name: fairseq looks whether there is one, and else keeps settings that the model does not have
    @wrap(kind, "build_model")
    def build_model(plain: Any, self: Any, args: Any, from_checkpoint: bool = False) -> Any:
        model = plain(self, args, from_checkpoint)
        positions = getattr(getattr(model, "decoder", None), "embed_positions", None)
        if self.args.add_bos_token and isinstance(positions, LearnedPositionalEmbedding):
            self.room = model.max_positions() - 1
        return model

    @wrap(kind, "load_dataset")
    def load_dataset(plain: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        given, room = self.args, getattr(self, "room", None)
        if room is None or given.tokens_per_sample != room + 1:
            return plain(self, *args, **kwargs)
        logger.info(
            f"blocks of {room} tokens: with the one of --add-bos-token they fill the learned positions"
        )
        self.args = copy.copy(given)
        self.args.tokens_per_sample = room
        try:
            return plain(self, *args, **kwargs)
        finally:
            self.args = given

    kind.max_positions = lambda self: getattr(self, "room", None)


@patch("fairseq.tasks.multilingual_translation", "fairseq.tasks.semisupervised_translation")
def a_model_for_each_pair(module: Any) -> None:
    """Every torch: a task of several models, given an architecture of one, ends in a traceback."""
    own = (value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__)
    kind: Any = next(value for value in own if isinstance(value, type))

    @wrap(kind, "build_model")
    def build_model(plain: Any, self: Any, args: Any, from_checkpoint: bool = False) -> Any:
        from fairseq.models import ARCH_MODEL_REGISTRY, FairseqMultiModel

        name = getattr(args, "arch", None) or getattr(args, "_name", None)
        model = ARCH_MODEL_REGISTRY.get(name)
        if model is not None and not issubclass(model, FairseqMultiModel):
            task = module.__name__.rpartition(".")[2]
            raise FlagError(
                f"--task {task} needs an architecture with a model for each pair, such as"
                f" multilingual_transformer, got --arch {name}; for one model of all pairs take"
                " --task translation_multi_simple_epoch"
            )
        return plain(self, args, from_checkpoint)


@patch("fairseq.search")
def constraints_that_arrive(module: Any) -> None:
    """Every torch: some tasks pass over the constraints that fairseq-interactive reads: TypeError."""
    kind = module.LexicallyConstrainedBeamSearch

    @wrap(kind, "init_constraints")
    def init_constraints(plain: Any, self: Any, batch_constraints: Any, beam_size: int) -> Any:
        if batch_constraints is None:
            raise FlagError("--constraints needs a task that hands them on, such as --task translation")
        return plain(self, batch_constraints, beam_size)
