"""What fairseq's models need."""

from __future__ import annotations

import logging
import math
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from packaging.version import Version

from xmoe_fairseq_compat.checkpoints import load_checkpoint as load
from xmoe_fairseq_compat.errors import CheckpointError, FlagError, UserError
from xmoe_fairseq_compat.files import MAPPED, from_all_ranks
from xmoe_fairseq_compat.registry import has, patch, stand_in, wrap


def development_build() -> bool:
    return has("torch") and Version(metadata.version("torch")).is_prerelease


@patch(
    "fairseq.modules.transformer_layer",
    "fairseq.models.transformer.transformer_encoder",
    when=development_build,
)
def read_development_versions(module: Any) -> None:
    """Every torch: fairseq reads the parts of its version as numbers, and a build 2.14.0a0 has none last."""
    import torch

    version = Version(torch.__version__)
    module.torch = stand_in(torch, __version__=f"{version.major}.{version.minor}.{version.micro}")


@patch("fairseq.models.ema.ema")
def average_floats_only(module: Any) -> None:
    """Every torch: --store-ema averages all of a state dict; torch refuses to for whole numbers."""

    @wrap(module.EMA, "__init__")
    def init(plain: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, model, *args, **kwargs)
        entries = model.state_dict().items()
        whole_numbers = {name for name, value in entries if not value.dtype.is_floating_point}
        self.skip_keys = {*self.skip_keys, *whole_numbers}


@patch("fairseq.models.ema.ema")
def average_tied_weights_once(module: Any) -> None:
    """Every torch: a weight with two names (embedding, output) is averaged twice: its decay is squared."""

    @wrap(module.EMA, "_step_internal")
    def step_internal(plain: Any, self: Any, new_model: Any, updates: Any = None) -> None:
        once: dict[Any, tuple[str, Any]] = {}
        for name, value in new_model.state_dict().items():
            place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
            once.setdefault(place, (name, value))
        plain(self, SimpleNamespace(state_dict=lambda: dict(once.values())), updates)


@patch("fairseq.models.ema.ema")
def keep_versions_in_averages(module: Any) -> None:
    """Every torch: without its `version` a decoder is taken for one of 2017, which had no final LayerNorm.

    Saved without the patch, an average has lost its LayerNorm; then that of the model takes its place.
    """
    logger = logging.getLogger(module.__name__)

    @wrap(module.EMA, "restore")
    def restore(plain: Any, self: Any, state_dict: Any, build_fp32_params: bool = False) -> None:
        own = self.model.state_dict()
        versions = {name: value for name, value in own.items() if name.rpartition(".")[2] == "version"}
        given = {*versions, *state_dict}
        places = {own[name].data_ptr() for name in given & own.keys()}
        lost = [name for name, value in own.items() if name not in given and value.data_ptr() not in places]
        if lost:
            logger.warning(f"the average (EMA) lacks {', '.join(lost)}: taken from the model")
        plain(self, {**own, **state_dict, **versions}, build_fp32_params)


@patch("fairseq.models.ema.ema")
def refuse_averages_that_stand_still(module: Any) -> None:
    """Every torch: steps of 1 - decay below the precision of the weights are rounded away, all of them."""
    import torch

    @wrap(module.EMA, "__init__")
    def init(plain: Any, self: Any, model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        decay = config.ema_decay
        types = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
        coarse = max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
        step = torch.finfo(coarse).eps
        if not config.ema_fp32 and 1 - decay < step:
            kind, most = str(coarse).removeprefix("torch."), math.floor((1 - step) * 1e3) / 1e3
            raise FlagError(
                f"--ema-decay {decay} needs --ema-fp32: weights in {kind} cannot step by {1 - decay:.1e},"
                f" so the average would stay where it began; or give at most {most}"
            )
        plain(self, model, config, *args, **kwargs)


@patch("fairseq.trainer")
def begin_an_average_later(module: Any) -> None:
    """Every torch: a run that goes on with --store-ema from a checkpoint without an average ends in
    KeyError: 'model', for it begins at weights that have just been thrown away."""

    @wrap(module.Trainer, "load_checkpoint")
    def load_checkpoint(plain: Any, self: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        ema, begins = self.cfg.ema, False
        if ema.store_ema and self.data_parallel_rank == 0 and module.PathManager.isfile(filename):
            path = module.PathManager.get_local_path(filename)
            begins = "ema" not in (load(path, sums=False, **MAPPED).get("extra_state") or {})
        if not (ema.store_ema and any(from_all_ranks(begins))):
            return plain(self, filename, *args, **kwargs)
        ema.store_ema = False
        try:
            extra_state = plain(self, filename, *args, **kwargs)
        finally:
            ema.store_ema = True
        module.logger.warning(f"{filename} holds no average (EMA): it begins at its weights")
        self.ema.restore(self.model.state_dict(), build_fp32_params=ema.ema_fp32)
        return extra_state


@patch("fairseq.checkpoint_utils")
def read_averages_whole(module: Any) -> None:
    """Every torch: an average (EMA) is read from one file, and taken as it is.

    A plugin's may lie in several files, and versions before the patch above lost the final LayerNorm.
    """

    def load_ema_from_checkpoint(fpath: Any) -> Any:
        state = module.load_checkpoint_to_cpu(fpath)
        average = (state.get("extra_state") or {}).get("ema")
        if not average:
            raise CheckpointError(fpath, "it has no averaged weights (EMA); train with --store-ema")
        if lost := sorted(state["model"].keys() - average.keys()):
            raise CheckpointError(fpath, f"its averaged weights (EMA) lack {', '.join(lost)}")
        state["model"] = {name: value.clone() for name, value in average.items()}
        return state

    module.load_ema_from_checkpoint = load_ema_from_checkpoint


@patch("fairseq.modules.transformer_layer", when=lambda: has("torch", 2))
def no_encoder_fast_path(module: Any) -> None:
    """In evaluation the encoder layer calls a private torch operation whose arguments changed in torch 2."""

    @wrap(module.TransformerEncoderLayerBase, "__init__")
    def __init__(plain: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.can_use_fastpath = False


@patch("fairseq.utils")
def read_embeddings(module: Any) -> None:
    """Every torch: a file of embeddings that is missing or does not fit ends in a traceback."""

    @wrap(module, "parse_embedding")
    def parse_embedding(plain: Any, embed_path: str) -> Any:
        try:
            embeddings = plain(embed_path)
        except OSError as error:
            raise UserError(f"embeddings {embed_path}: {error.strerror}") from None
        except (StopIteration, ValueError) as error:
            rule = "must hold a line of two numbers, then a word and its numbers in each line"
            raise UserError(f"embeddings {embed_path} {rule}: {str(error) or 'it is empty'}") from None
        return embeddings

    @wrap(module, "load_embedding")
    def load_embedding(plain: Any, embed_dict: Any, vocab: Any, embedding: Any) -> Any:
        for word, vector in embed_dict.items():
            if len(vector) != embedding.embedding_dim:
                size = f"{len(vector)} numbers, the model {embedding.embedding_dim}"
                raise FlagError(f"--encoder-embed-path or --decoder-embed-path: {word!r} has {size}")
        return plain(embed_dict, vocab, embedding)
