"""What fairseq's data sets and iterators need."""

from __future__ import annotations

import io
import os
from typing import Any

from xmoe_fairseq_compat.errors import FlagError
from xmoe_fairseq_compat.registry import has, patch, stand_in, wrap


@patch(
    "fairseq.data.data_utils",
    "fairseq.data.language_pair_dataset",
    "fairseq.data.token_block_dataset",
    "fairseq.modules.dynamic_crf_layer",
    when=lambda: has("numpy", 1, 24),
)
def old_numpy_names(module: Any) -> None:
    """np.int and np.float went in numpy 1.24, np.compat in 2.0, percentile(interpolation=) in 2.4."""
    import numpy

    class compat:
        long = int

    def percentile(a: Any, q: Any, interpolation: Any = "linear", **kwargs: Any) -> Any:
        return numpy.percentile(a, q, method=interpolation, **kwargs)

    module.np = stand_in(numpy, int=int, float=float, compat=compat, percentile=percentile)


@patch("fairseq.data.iterators")
def resume_on_another_number_of_ranks(module: Any) -> None:
    """Every torch: a checkpoint's place in the epoch counts one rank's batches, so with fewer or more ranks
    a resumed run would read some of the epoch's batches again, or leave some out."""
    iterator = module.EpochBatchIterator

    @wrap(iterator, "state_dict")
    def state_dict(plain: Any, self: Any) -> dict[str, Any]:
        return {**plain(self), "num_shards": self.num_shards}

    @wrap(iterator, "load_state_dict")
    def load_state_dict(plain: Any, self: Any, state: dict[str, Any]) -> None:
        read = state.get("iterations_in_epoch", 0) * state.get("num_shards", self.num_shards)
        plain(self, {**state, "iterations_in_epoch": read // self.num_shards})


@patch("fairseq.data.indexed_dataset", when=lambda: has("numpy", 2))
def place_sentences_beyond_two_gigabytes(module: Any) -> None:
    """numpy >= 2 adds a size read from a worker's part to a place in 32 bits: `fairseq-preprocess --workers`
    writes wrong places once the data passes 2 GB, with nothing but a warning of an overflow."""

    @wrap(module.MMapIndexedDatasetBuilder, "finalize")
    def finalize(plain: Any, self: Any, index_file: str) -> None:
        self._sizes = [int(size) for size in self._sizes]
        plain(self, index_file)


@patch("fairseq.data.indexed_dataset")
def map_empty_data(module: Any) -> None:
    """Every torch: an empty file cannot be mapped, so an empty set of sentences ends in a ValueError."""
    import numpy

    class Nothing(numpy.ndarray):
        _mmap = io.BytesIO()  # which fairseq closes

    def memmap(path: str, **kwargs: Any) -> Any:
        if os.path.getsize(path) == 0:
            return numpy.zeros(0, numpy.uint8).view(Nothing)
        return numpy.memmap(path, **kwargs)

    module.np = stand_in(numpy, memmap=memmap)


@patch("fairseq.data.data_utils")
def name_what_joins_pieces(module: Any) -> None:
    """Every torch: a misspelt --remove-bpe ends in a traceback, after the first batch was translated."""

    @wrap(module, "post_process")
    def post_process(plain: Any, sentence: str, symbol: str | None) -> Any:
        try:
            return plain(sentence, symbol)
        except NotImplementedError as error:
            known = "subword_nmt, sentencepiece, wordpiece, letter, silence, _EOW, none"
            rule = f"--remove-bpe (--post-process) must be one of {known}, got {symbol}"
            raise FlagError(rule) from error
