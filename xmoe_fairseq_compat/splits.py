"""The sets of a data folder (train, valid, test): there, not empty, and of sentences that fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from xmoe_fairseq_compat.dictionaries import names_in, task_of
from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.registry import patch, replaced, wrap
from xmoe_fairseq_compat.settings import configuration
from xmoe_fairseq_compat.shares import with_each_task


@patch("fairseq.tasks.language_modeling", "fairseq.tasks.translation")
def name_a_missing_set(module: Any) -> None:
    """Every torch: a data folder, or a set in it, that is not there ends in a traceback."""
    say_which_sets_there_are(task_of(module))


def say_which_sets_there_are(task: Any) -> None:

    @wrap(task, "load_dataset")
    def load_dataset(plain: Any, self: Any, split: str, *args: Any, **kwargs: Any) -> Any:
        from fairseq.utils import split_paths

        try:
            return plain(self, split, *args, **kwargs)
        except FileNotFoundError as error:
            cfg = self.cfg or self.args
            folder, pair = split_paths(cfg.data)[0], ""
            if getattr(cfg, "source_lang", None):
                pair = f" of {cfg.source_lang}-{cfg.target_lang}"
            sets = {name.split(".")[0] for name in names_in(folder) if name.endswith(".idx")}
            there = ", ".join(sorted(sets)) or "none"
            raise UserError(f"no set {split!r}{pair} in {folder}; sets there: {there}") from error


@patch("fairseq.tasks.translation")
def join_sets_of_pairs(module: Any) -> None:
    """Every torch: sets that are joined (train and train1, or --combine-valid-subsets) end in "negative
    dimensions", because --upsample-primary is -1 where it is not given; and two sides of unequal length in an
    assertion that does not name them."""

    signature = inspect.signature(module.load_langpair_dataset)

    @wrap(module, "load_langpair_dataset")
    def load_langpair_dataset(plain: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        data_path, split = given.arguments["data_path"], given.arguments["split"]
        given.arguments["upsample_primary"] = max(1, given.arguments.get("upsample_primary", 1))
        try:
            return plain(*given.args, **given.kwargs)
        except AssertionError as error:
            if "same number of examples" not in str(error):
                raise
            rule = "source and target must have as many lines"
            raise UserError(f"{split!r} in {data_path}: {rule}; binarise both again") from error


@patch("fairseq.data.data_utils")
def refuse_an_empty_set(module: Any) -> None:
    """Every torch: a set without a sentence ends in an assertion, in a division by zero or in BLEU 0."""

    @wrap(module, "load_indexed_dataset")
    def load_indexed_dataset(plain: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        dataset = plain(path, *args, **kwargs)
        if dataset is not None and len(dataset) == 0:
            raise UserError(f"{path} holds no sentence; name another set, or train with --disable-validation")
        return dataset


@patch("fairseq_cli.train")
def read_the_sets_that_are_asked_for(module: Any) -> None:
    """Every torch: --disable-validation reads the validation sets all the same, and fails if one is not there
    or empty; --combine-valid-subsets reads one joined set, and looks for those of --valid-subset."""

    @wrap(module, "main")
    def main(plain: Any, cfg: Any) -> Any:
        cfg = configuration(cfg)

        def see_to(task: Any) -> None:
            plain_load = task.load_dataset

            def load_dataset(split: str, *args: Any, **kwargs: Any) -> None:
                if split == cfg.dataset.train_subset or not cfg.dataset.disable_validation:
                    load_with_targets(task, plain_load, split, *args, **kwargs)

            task.load_dataset = load_dataset

        if cfg.dataset.combine_valid_subsets:
            cfg.dataset.valid_subset = "valid"
        with replaced(module, tasks=with_each_task(module.tasks, see_to)):
            return plain(cfg)


def load_with_targets(task: Any, load: Callable[..., Any], split: str, *args: Any, **kwargs: Any) -> None:
    """Raises UserError where a set has no target side: nothing to learn from, or to validate with."""
    from fairseq.data import LanguagePairDataset

    load(split, *args, **kwargs)
    dataset = task.datasets.get(split)
    if isinstance(dataset, LanguagePairDataset) and dataset.tgt is None:
        raise UserError(f"the set {split!r} in {task.cfg.data} has no target side ({task.cfg.target_lang})")


@patch("fairseq.data.data_utils")
def know_the_names_of_valid_sets(module: Any) -> None:
    """Every torch: for pairs, `--valid-subset valid,valid1` is refused: valid1.en-de.en was not named."""
    plain_find = module._find_extra_valid_paths
    module._find_extra_valid_paths = lambda path: {name.split(".")[0] for name in plain_find(path)}


@patch("fairseq.data.data_utils")
def say_which_length_is_too_long(module: Any) -> None:
    """Every torch: --max-tokens below the longest sentence ends in an assertion."""

    @wrap(module, "batch_by_size")
    def batch_by_size(
        plain: Any, indices: Any, num_tokens_fn: Any, num_tokens_vec: Any = None, max_tokens: Any = None,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        try:
            return plain(indices, num_tokens_fn, num_tokens_vec, max_tokens, *args, **kwargs)
        except AssertionError as error:
            if max_tokens is None or len(indices) == 0:
                raise
            longest = (
                max(num_tokens_fn(i) for i in indices) if num_tokens_vec is None else max(num_tokens_vec)
            )
            if longest <= max_tokens:
                raise
            rule = f"must be at least the longest sentence or block, {longest} tokens"
            raise FlagError(f"--max-tokens {rule}, got {max_tokens}") from error


@patch("fairseq.tasks.fairseq_task")
def say_which_sentence_is_too_long(module: Any) -> None:
    """Every torch: a sentence that is longer than the model takes ends in a traceback."""

    @wrap(module.FairseqTask, "filter_indices_by_size")
    def filter_indices_by_size(
        plain: Any, self: Any, indices: Any, dataset: Any, max_positions: Any = None,
        ignore_invalid_inputs: bool = False,
    ) -> Any:  # fmt: skip
        try:
            return plain(self, indices, dataset, max_positions, ignore_invalid_inputs)
        except Exception as error:
            if type(error) is Exception:
                raise UserError(str(error)) from error
            raise


@patch("fairseq.data.iterators")
def say_that_no_sentence_fits(module: Any) -> None:
    """Every torch: a set whose sentences are all too long ends in a traceback."""
    plain_first = module.EpochBatchIterator.first_batch.fget

    def first_batch(self: Any) -> Any:
        if len(self.frozen_batches) == 0:
            raise UserError(
                f"all {len(self.dataset)} sentences of a set are longer than the model or --max-tokens allow;"
                " nothing is left of it"
            )
        return plain_first(self)

    module.EpochBatchIterator.first_batch = property(first_batch)
