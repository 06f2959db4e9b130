"""From a command of fairseq-train and a folder of data-prep to what `arithmetic.py` goes by."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

import xmoe_fairseq  # noqa: F401  (registers the models)
from experiments.counts import Counts
from experiments.dimensions import PRECISIONS, Shape, Stack
from experiments.plan import Plan
from experiments.results import lines
from xmoe_fairseq.activated import planned_experts
from xmoe_fairseq.flags import MoEConfig, settled_config
from xmoe_fairseq_compat.errors import FlagError, flag

DICTIONARY = {"wmt": 31_999, "lm": 50_257}  # the paper's pieces; <unk> is fairseq's own
SPECIAL, MULTIPLE = 4, 8  # fairseq's entries; data-prep fills up to a multiple
SENTENCE, EPOCH = 32, 1_000_000_000  # tokens of a sentence, of one side of the text: assumed
# What the arithmetic does not know.
UNKNOWN = (
    "adaptive_input", "adaptive_softmax_cutoff", "amp", "character_embeddings",
    "checkpoint_activations", "cross_self_attention", "decoder_layerdrop", "encoder_layerdrop",
    "moe_router_hidden_dim", "no_cross_attention", "no_token_positional_embeddings",
    "offload_activations", "quant_noise_pq",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """What has to be known of DATA."""

    dictionary: int  # entries, fairseq's own and those that fill up among them
    sentence: int  # tokens
    epoch: int  # tokens of one side
    source: str  # of these numbers

    @classmethod
    def of(cls, task: str, data: Path) -> "Text":
        """Raises FlagError: there is a bin/ without a dictionary."""
        if not (data / "bin").exists():
            entries = -(-(DICTIONARY[task] + SPECIAL) // MULTIPLE) * MULTIPLE
            return cls(entries, SENTENCE, EPOCH, "DATA is not there, so the paper's")
        pattern = {"lm": "dict.txt", "wmt": "dict.*.txt"}[task]
        files = sorted((data / "bin").glob(pattern))
        if not files:
            raise FlagError(f"DATA must hold bin/{pattern}, or no bin/ at all with --dry-run, got {data}")
        entries = SPECIAL + len(lines(files[0]))
        if not (data / "counts/bpe-train.json").exists() or not (data / "counts/spm.json").exists():
            return cls(entries, SENTENCE, EPOCH, "of DATA, which has no counts/")
        counts = Counts(task, data)
        tokens = counts.tokens("train")
        return cls(entries, max(1, round(tokens / counts.counts["bpe-train"]["kept"])), tokens, "of DATA")

    def about(self, task: str) -> str:
        rest = f", {self.sentence} tokens a sentence and {self.epoch:,} a side" if task == "wmt" else ""
        assumed = " (assumed)" if rest and self.source != "of DATA" else ""
        return f"dictionary of {self.dictionary:,}{rest}{assumed}, {self.source}"


def parse(words: list[str]) -> tuple[Namespace, Any]:
    """The words behind fairseq-train, by its own parser: flat, with the model's defaults, and nested."""
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    cfg = convert_namespace_to_omegaconf(args)
    defaults: Any = OmegaConf.to_container(cfg.model) if OmegaConf.is_config(cfg.model) else {}
    own = {name: value for name, value in defaults.items() if not str(value).startswith("${")}
    return Namespace(**own | vars(args)), cfg


def check_known(args: Namespace) -> None:
    """Raises FlagError: what the arithmetic does not know."""
    given = {name: getattr(args, name) for name in UNKNOWN if getattr(args, name, None)}
    if embedding_dim(args, "output") != embedding_dim(args, "input"):
        given["decoder_output_dim"] = args.decoder_output_dim
    given |= {"moe_router": "gshard"} if getattr(args, "moe_router", "") == "gshard" else {}
    for name, value in given.items():
        why = "cannot be combined with --dry-run, whose arithmetic knows no such model"
        raise FlagError(f"{flag(name)} {value} {why}")


def embedding_dim(args: Namespace, side: str) -> int:
    return int(getattr(args, f"decoder_{side}_dim", None) or args.decoder_embed_dim)


def precision(args: Namespace) -> str:
    """The flag, or "" for fp32."""
    return next((name for name in PRECISIONS if name and getattr(args, name)), "")


def stack_of(args: Namespace, moe: MoEConfig | None, side: str, length: int) -> Stack:
    def own(name: str, default: Any = None) -> Any:
        return getattr(args, f"{side}_{name}", default)

    attends = side == "decoder" and hasattr(args, "encoder_layers")
    width = own("embed_dim")
    most = getattr(args, "max_source_positions" if side == "encoder" else "max_target_positions", 0)
    positions = most or getattr(args, "tokens_per_sample", 0)
    return Stack(
        layers=own("layers"), model_dim=width, ffn_dim=own("ffn_embed_dim"), heads=own("attention_heads"),
        length=length, memory_dim=args.encoder_embed_dim if attends else 0, unused=side == "encoder",
        prenorm=bool(own("normalize_before")) and not getattr(args, "no_decoder_final_norm", False),
        moe_freq=moe.moe_freq if moe and moe.has_experts(side) else 0,
        embedding_norm=bool(getattr(args, "layernorm_embedding", False)),
        learned_positions=positions + 2 if own("learned_pos") else 0,  # from behind fairseq's padding on
    )  # fmt: skip


def shape_of(plan: Plan, args: Namespace, text: Text) -> Shape:
    """Of one rank."""
    length = args.tokens_per_sample if plan.task == "lm" else text.sentence
    most = [args.max_tokens // length] if args.max_tokens else []
    sides = ("encoder", "decoder") if plan.task == "wmt" else ("decoder",)
    shared = getattr(args, "share_all_embeddings", False) or len(sides) == 1
    tied = shared or getattr(args, "share_decoder_input_output_embed", False)
    moe = settled_config(args) if args.arch.startswith("xmoe_") else None
    stacks = tuple(stack_of(args, moe, side, length) for side in sides)
    common = {
        "stacks": stacks, "vocabulary": text.dictionary,
        "sentences": max(1, min([*most, *([args.batch_size] if args.batch_size else [])])),
        "embeddings": 1 + (not shared) + (not tied),
        "embedding_dim": embedding_dim(args, "input") if len(sides) == 1 else args.decoder_embed_dim,
        "relu": args.activation_fn == "relu",
        "dropout": args.dropout,
        "activation_dropout": getattr(args, "activation_dropout", 0) or getattr(args, "relu_dropout", 0),
        "precision": PRECISIONS[precision(args)],
    }  # fmt: skip
    if moe is None or not any(stack.moe_layers for stack in stacks):
        return Shape(**common)
    ranks = moe.moe_expert_parallel_size
    return Shape(
        **common, experts=moe.moe_num_experts, split=moe.moe_ffn_split, shared_experts=moe.moe_shared_experts,
        cheap_experts=moe.moe_zero_experts + moe.moe_copy_experts + moe.moe_constant_experts,
        constant_experts=moe.moe_constant_experts, router=moe.moe_router,
        output_bias=moe.moe_combine == "ones",
        held=moe.moe_num_experts // (plan.gpus if ranks == -1 else ranks),
    )  # fmt: skip


def experts_of(shape: Shape, args: Namespace) -> tuple[float, float]:
    """Routed experts of a token, at least and at most; 0 without any."""
    if not shape.held:
        return 0.0, 0.0
    moe = settled_config(args)
    exactly, most = planned_experts(args) or ("at most ", shape.experts)
    takes_all = moe.moe_threshold == 1 and moe.moe_threshold_rule == "mass"
    most = min(most, moe.moe_capacity_factor or most)
    return (1.0 if exactly == "at most " and not takes_all else most), most
