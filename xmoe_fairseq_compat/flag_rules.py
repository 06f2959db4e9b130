"""What fairseq's own settings must satisfy, as one table; flags.py checks it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

Holds = Callable[[Any, Mapping[str, Any]], bool]
# Names of settings, the rule, and whether it holds for a value (or each in a list) beside the other settings.
Rule = tuple[str, str, Holds]
INFINITY = float("inf")
MOST = 2**63 - 1  # what fairseq's batching in C takes


def whole(least: int, most: int = MOST) -> Holds:
    return lambda value, _: least <= value <= most and float(value).is_integer()


def between(least: float, below: float) -> Holds:
    return lambda value, _: least <= value < below


def scheduler(given: Mapping[str, Any]) -> Any:
    """Of the command line, or of hydra's group."""
    return given.get("lr_scheduler", given.get("_name"))


def numbers(value: Any) -> Iterable[Any]:
    return value if isinstance(value, Iterable) else [value]


def has_megatron() -> bool:
    """Whether fairseq brings it along: a submodule of its repository, not of its package."""
    return bool(find_spec("fairseq.model_parallel.megatron"))


def betas(name: str) -> Rule:
    rule = "must be two numbers in [0, 1), such as (0.9, 0.98)"
    return name, rule, lambda value, given: 0 <= value < 1 and len(given[name]) == 2


COUNT, COUNT_OR_0 = "must be a whole number in [1, 2^63)", "must be a whole number in [0, 2^63)"
POSITIONS: Rule = ("tokens_per_sample max_source_positions max_target_positions", COUNT, whole(1))

RUN: tuple[Rule, ...] = (
    POSITIONS,
    (
        "batch_size max_tokens batch_size_valid max_tokens_valid update_freq required_batch_size_multiple "
        "required_seq_len_multiple log_interval save_interval validate_interval distributed_world_size "
        "num_shards beam nbest softmax_batch workers padding_factor iter_decode_with_beam "
        "ema_update_freq localsgd_frequency nprocs_per_node max_valid_steps fp16_init_scale "
        "amp_init_scale fp16_scale_window amp_scale_window all_gather_list_size model_parallel_size "
        "bucket_cap_mb distributed_num_procs checkpoint_shard_count",
        COUNT,
        whole(1),
    ),
    (
        "num_workers max_update max_epoch warmup_updates save_interval_updates validate_interval_updates "
        "validate_after_updates curriculum data_buffer_size no_repeat_ngram_size prefix_size "
        "iter_decode_max_iter thresholdsrc thresholdtgt ema_start_update amp_batch_retries shard_id min_len "
        "force_anneal empty_cache_freq max_len_b buffer_size "
        "distributed_rank pipeline_chunks ignore_prefix_size",
        COUNT_OR_0,
        whole(0),
    ),
    ("seed fixed_validation_seed", "must be in [0, 2^32)", whole(0, 2**32 - 1)),  # numpy's
    (
        "keep_interval_updates keep_interval_updates_pattern keep_last_epochs keep_best_checkpoints "
        "nwordssrc nwordstgt",
        "must be -1 (all) or more",
        whole(-1),
    ),
    (
        "patience sampling_topk diverse_beam_groups",
        "must be -1 (off) or at least 1",
        lambda value, _: value == -1 or whole(1)(value, _),
    ),
    ("sampling_topp", "must be -1 (off) or in (0, 1]", lambda value, _: value == -1 or 0 < value <= 1),
    (
        "clip_norm adam_eps adafactor_eps end_learning_rate stop_time_hours "
        "min_loss_scale threshold_loss_scale diverse_beam_strength lr_shrink",
        "must be a number, 0 or more",
        between(0, INFINITY),
    ),
    (
        "warmup_init_lr",
        "must be -1 (the scheduler's own) or in [0, 10^6)",
        lambda value, _: value == -1 or 0 <= value < 1e6,
    ),
    (
        "unkpen lm_weight stop_min_lr",
        "must be a number",
        lambda v, _: abs(v) < INFINITY,
    ),
    ("temperature power", "must be above 0", lambda value, _: 0 < value < INFINITY),
    # Bounds of 100, 10^6 and 2^20 are choices: beyond them are typing errors, and numbers that overflow.
    ("lenpen diversity_rate", "must be in (-100, 100)", lambda value, _: abs(value) < 100),
    ("max_len_a lr weight_decay", "must be in [0, 10^6)", between(0, 1e6)),
    ("label_smoothing momentum slowmo_momentum ema_decay", "must be in [0, 1)", between(0, 1)),
    ("fp16_scale_tolerance", "must be in [0, 1]", lambda value, _: 0 <= value <= 1),
    ("num_batch_buckets", "must be a whole number in [0, 2^20]", whole(0, 2**20)),
    (
        "warmup_updates",
        "must be at least 1 with --lr-scheduler inverse_sqrt",
        lambda value, given: value >= 1 or scheduler(given) != "inverse_sqrt",
    ),
    (
        "lr_period_updates",
        "must be -1 (off) or above 0",
        lambda value, _: value == -1 or 0 < value < INFINITY,
    ),
    ("t_mult", "must be in (0, 10^6)", lambda value, _: 0 < value < 1e6),
    (
        "min_lr",
        "must be in [0, --lr {lr})",
        lambda value, given: 0 <= value < max(numbers(given["lr"])),
    ),
    ("model_parallel_size", "must be 1 without Megatron-LM", lambda value, _: value == 1 or has_megatron()),
    ("bf16 amp", "cannot be combined with --fp16", lambda value, given: not (value and given["fp16"])),
    ("bf16", "cannot be combined with --amp", lambda value, given: not (value and given["amp"])),
    betas("adam_betas"),
    betas("adamax_betas"),
    betas("lamb_betas"),
    ("nbest", "must be at most --beam {beam}", lambda value, given: value <= given["beam"]),
    (
        "diverse_beam_groups",
        "must divide --beam {beam}",
        lambda value, given: value == -1 or given["beam"] % value == 0,
    ),
    ("shard_id", "must be below --num-shards {num_shards}", lambda value, given: value < given["num_shards"]),
)


def divides(side: str) -> Rule:
    width = f"{side}_embed_dim"
    rule = f"must divide --{side}-embed-dim {{{width}}}"
    return f"{side}_attention_heads", rule, lambda value, given: given[width] % value == 0


def wide_enough(side: str) -> Rule:
    """Sinusoidal positions divide by half the width, less one."""
    rule = f"must be at least 4 without --{side}-learned-pos"
    learned = f"{side}_learned_pos"

    def holds(value: Any, given: Mapping[str, Any]) -> bool:
        return value >= 4 or given[learned] or bool(given.get("no_token_positional_embeddings"))

    return f"{side}_embed_dim", rule, holds


TRANSFORMER: tuple[Rule, ...] = (
    POSITIONS,
    (
        "encoder_layers decoder_layers encoder_embed_dim decoder_embed_dim encoder_ffn_embed_dim "
        "decoder_ffn_embed_dim encoder_attention_heads decoder_attention_heads decoder_input_dim "
        "decoder_output_dim quant_noise_pq_block_size character_embedding_dim",
        "must be a whole number in [1, 2^20]",  # the largest models have widths of 2^16
        whole(1, 2**20),
    ),
    (
        "dropout attention_dropout activation_dropout relu_dropout adaptive_softmax_dropout "
        "encoder_layerdrop decoder_layerdrop",
        "must be in [0, 1)",
        between(0, 1),
    ),
    ("quant_noise_pq quant_noise_scalar", "must be in [0, 1]", lambda value, _: 0 <= value <= 1),
    ("adaptive_input_factor adaptive_softmax_factor", "must be above 0", lambda v, _: 0 < v < INFINITY),
    wide_enough("encoder"),
    wide_enough("decoder"),
    divides("encoder"),
    divides("decoder"),
    ("adaptive_input_cutoff adaptive_softmax_cutoff", "must be whole numbers, such as 20000,60000", whole(0)),
    (
        "share_decoder_input_output_embed",
        "needs --decoder-output-dim {decoder_output_dim} to be the width of the embedding",
        lambda value, given: (
            not value
            or bool(given.get("adaptive_softmax_cutoff"))
            or given["decoder_output_dim"]
            == given["decoder_embed_dim" if "encoder_embed_dim" in given else "decoder_input_dim"]
        ),
    ),
)
