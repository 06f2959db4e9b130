"""What fairseq's adaptive softmax and embeddings need: one line for flags that do not fit together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from xmoe_fairseq_compat.errors import FlagError, flag
from xmoe_fairseq_compat.registry import patch, wrap


@patch("fairseq.criterions.adaptive_loss")
def adaptive_loss_needs_a_cutoff(module: Any) -> None:
    """Every torch: with a model that has no adaptive softmax it ends in an AssertionError without a word."""

    @wrap(module.AdaptiveLoss, "forward")
    def forward(plain: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(model.decoder, "adaptive_softmax", None) is None:
            raise FlagError(f"--criterion {name_of(type(self))} needs a model with --adaptive-softmax-cutoff")
        return plain(self, model, *args, **kwargs)


def name_of(criterion: Any) -> str:
    from fairseq.criterions import CRITERION_REGISTRY

    return next((name for name, kind in CRITERION_REGISTRY.items() if kind is criterion), "adaptive_loss")


@patch("fairseq.criterions.adaptive_loss")
def adaptive_loss_in_one_process(module: Any) -> None:
    """Every torch: it refuses pytorch_ddp, the default, in a page, and where there is one process too.

    On several ranks it is right: what a batch lacks of the vocabulary has no gradient there.
    """

    def build_criterion(cls: Any, cfg: Any, task: Any) -> Any:
        from fairseq.distributed.utils import get_global_world_size

        backend = str(cfg.ddp_backend)
        if backend in ("c10d", "pytorch_ddp") and get_global_world_size() > 1:
            raise FlagError(f"--criterion {name_of(cls)} needs --ddp-backend legacy_ddp, got {backend}")
        return cls(task, cfg.sentence_avg)

    module.AdaptiveLoss.build_criterion = classmethod(build_criterion)


@patch("fairseq.modules.adaptive_softmax")
def train_adaptive_softmax_by_its_own_loss(module: Any) -> None:
    """Every torch: with other criterions training ends in an error about an operation in place."""

    @wrap(module.AdaptiveSoftmax, "get_log_prob")
    def get_log_prob(plain: Any, self: Any, input: Any, target: Any) -> Any:
        if self.training and input.requires_grad:
            raise FlagError("--adaptive-softmax-cutoff needs --criterion adaptive_loss")
        return plain(self, input, target)


def check_cutoff(flag: str, cutoff: Any, vocab_size: int) -> None:
    """Raises FlagError if the parts of a vocabulary that `cutoff` makes are not there, or empty."""
    rises = cutoff and all(low < high for low, high in pairwise([0, *cutoff, vocab_size + 1]))
    if not rises:
        rule = f"must rise, to the size of the vocabulary, {vocab_size}, at most"
        raise FlagError(f"{flag} {rule}, got {','.join(map(str, cutoff or [])) or None}")


@patch("fairseq.modules.adaptive_softmax", "fairseq.modules.adaptive_input")
def check_cutoffs(module: Any) -> None:
    """Every torch: cutoffs that do not rise make parts of no size, or end in an AssertionError."""
    name, flag, place = {
        "fairseq.modules.adaptive_softmax": ("AdaptiveSoftmax", "--adaptive-softmax-cutoff", 2),
        "fairseq.modules.adaptive_input": ("AdaptiveInput", "--adaptive-input-cutoff", 5),
    }[module.__name__]
    kind = getattr(module, name)

    @wrap(kind, "__init__")
    def init(plain: Any, self: Any, vocab_size: int, *args: Any, **kwargs: Any) -> None:
        cutoff = kwargs["cutoff"] if "cutoff" in kwargs else args[place - 1]
        check_cutoff(flag, cutoff, vocab_size)
        plain(self, vocab_size, *args, **kwargs)


TIED = (
    ("adaptive_softmax_cutoff", "adaptive_input_cutoff"),
    ("adaptive_softmax_factor", "adaptive_input_factor"),
    ("decoder_output_dim", "decoder_input_dim"),
    ("decoder_output_dim", "decoder_embed_dim"),
)
SHARE = "--share-decoder-input-output-embed"


@patch("fairseq.models.transformer_lm")
def check_adaptive_flags(module: Any) -> None:
    """Every torch: embeddings that cannot be shared end in a traceback, or are not shared."""

    @wrap(module.TransformerLanguageModel, "build_model")
    def build_model(plain: Any, cls: Any, args: Any, task: Any) -> Any:
        if args.share_decoder_input_output_embed:
            for name in ("adaptive_input", "character_embeddings", "adaptive_softmax_cutoff"):
                if getattr(args, name):
                    raise FlagError(f"{SHARE} cannot be combined with {flag(name)}")
        if args.tie_adaptive_weights and not args.adaptive_input:
            raise FlagError("--tie-adaptive-weights needs --adaptive-input")
        for one, two in TIED if args.tie_adaptive_weights else ():
            value, other = getattr(args, one), getattr(args, two)
            if value != other:
                rule = f"must be {flag(two)} {other} with --tie-adaptive-weights"
                raise FlagError(f"{flag(one)} {rule}, got {value}")
        return plain(cls, args, task)


NOT_IN_TRANSLATION = ("adaptive_input", "tie_adaptive_weights", "tie_adaptive_proj", "char_inputs")


@patch("fairseq.models.transformer.transformer_base")
def check_embeddings_of_translation(module: Any) -> None:
    """Every torch: a translation model takes --adaptive-input and the like, and has ordinary embeddings."""

    @wrap(module.TransformerModelBase, "build_model")
    def build_model(plain: Any, cls: Any, cfg: Any, task: Any) -> Any:
        for name in NOT_IN_TRANSLATION:
            if getattr(cfg, name):
                raise FlagError(f"{flag(name)} does nothing in a translation model: leave it out")
        shared = cfg.share_decoder_input_output_embed and not cfg.share_all_embeddings
        if shared and cfg.adaptive_softmax_cutoff:
            raise FlagError(f"{SHARE} cannot be combined with --adaptive-softmax-cutoff")
        return plain(cls, cfg, task)


@patch("fairseq.models.transformer.transformer_decoder")
def load_adaptive_softmax(module: Any) -> None:
    """Every torch: with --share-all-embeddings a checkpoint with an adaptive softmax is not loaded."""
    kind = module.TransformerDecoderBase

    @wrap(kind, "upgrade_state_dict_named")
    def upgrade_state_dict_named(plain: Any, self: Any, state_dict: Any, name: str) -> Any:
        upgraded = plain(self, state_dict, name)
        if self.adaptive_softmax is not None:
            state_dict.pop(f"{name}.output_projection.weight", None)
        return upgraded


@patch("fairseq.sequence_generator")
def temperature_of_all_words(module: Any) -> None:
    """Every torch: --temperature tempers each part of an adaptive softmax by itself."""

    @wrap(module.SequenceGenerator, "__init__")
    def init(plain: Any, self: Any, models: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, models, *args, **kwargs)
        decoders = [getattr(model, "decoder", None) for model in self.model.models]
        if self.temperature != 1 and any(getattr(d, "adaptive_softmax", None) is not None for d in decoders):
            raise FlagError(f"--temperature must be 1 with an adaptive softmax, got {self.temperature}")
