"""Batches of a binarised data folder, in one pass and little memory."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xmoe_fairseq_compat.errors import FlagError


def binarised_folders(data: Path, flag: str) -> str:
    """A folder of data-prep (bin/, bin1/, ...) or of fairseq-preprocess, as fairseq wants it.

    Args:
        flag: that named it.

    Raises:
        FlagError: there is no dictionary in it.
    """
    first = data / "bin" if (data / "bin").is_dir() else data
    if not any(first.glob("dict*.txt")):
        rule = "must be a folder of data-prep or fairseq-preprocess, with dict*.txt"
        raise FlagError(f"{flag} {rule}, got {data}")
    return with_further_shards(first, data)


def with_further_shards(first: Path, data: Path) -> str:
    """The folder `first` and data/bin1, data/bin2, ... as fairseq wants several folders of training data."""
    further = [path for path in data.glob("bin*") if re.fullmatch(r"bin\d+", path.name)]
    return ":".join(map(str, [first, *sorted(further, key=lambda path: int(path.name[3:]))]))


class Batches:
    """The same batches of one split in every pass, up to a number of target tokens; nothing is kept.

    Args:
        task: fairseq's.
        limit: target tokens; the batches come in an order drawn from the seed.
    """

    def __init__(self, task: Any, split: str, limit: int, max_tokens: int, seed: int) -> None:
        if split not in task.datasets:
            task.load_dataset(split, combine=False)
        self.task, self.split, self.limit = task, split, limit
        self.max_tokens, self.seed = max_tokens, seed
        self.number: int | None = None  # of batches; known after the first pass

    def first(self, tokens: int) -> "Batches":
        """Up to so many target tokens."""
        return Batches(self.task, self.split, tokens, self.max_tokens, self.seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises FlagError if a batch cannot hold the longest sentence."""
        # A batch must hold one sample at least: of a language model a whole block, which has no other limit.
        settings = self.task.cfg or getattr(self.task, "args", None)  # fairseq's older tasks have the latter
        block = int(getattr(settings, "tokens_per_sample", None) or 0)
        try:
            iterator = self.task.get_batch_iterator(
                self.task.dataset(self.split), max_tokens=max(self.max_tokens, block), max_sentences=None,
                seed=self.seed, max_positions=None if block else self.task.max_positions(),
                ignore_invalid_inputs=True, disable_iterator_cache=True,
            ).next_epoch_itr(shuffle=True)  # fmt: skip
        except AssertionError as error:
            raise FlagError(f"--max-tokens {self.max_tokens} is too small: {error}") from None
        tokens = number = 0
        for sample in iterator:
            if not sample:
                continue
            yield sample
            number, tokens = number + 1, tokens + sample["ntokens"]
            if tokens >= self.limit:
                break
        self.number = number
