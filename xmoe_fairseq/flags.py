"""The --moe-* flags of a model. What they must satisfy is in config.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from enum import Enum
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass

from xmoe_fairseq.moe.experts.kernels import AUTO, kernel_names
from xmoe_fairseq.moe.routers.registry import DEFAULT, RouterKind, flags_of_routers, registered_routers


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def kind_of(default: Any) -> Any:
    """The type of a flag; one without a default is a number."""
    return Optional[float] if default is None else type(default)  # noqa: UP045  (fairseq knows no other form)


def takes_weights(kind: type[RouterKind], combine: str) -> bool:
    return bool(getattr(kind, f"takes_{combine}", True))


def takers_of(combine: str) -> str:
    return ", ".join(name for name, kind in registered_routers().items() if takes_weights(kind, combine))


@dataclass
class CommonFlags(FairseqDataclass):
    """What every router goes with."""

    moe_freq: int = _flag(2, "every Nth layer is an MoE layer (counted from 1); 0 = dense model")
    no_moe_encoder: bool = _flag(False, "keep the encoder dense")
    no_moe_decoder: bool = _flag(False, "keep the decoder dense")
    moe_router: str = _flag(DEFAULT, "how a token chooses experts")  # MoEConfig._get_help says more
    moe_router_args: Any = _flag(
        "", "what a router of your own (--user-dir) takes, as a JSON object, such as '{\"factor\": 2.0}'"
    )
    moe_num_experts: int = _flag(32, "number of experts E in an MoE layer, after the split")
    moe_ffn_split: int = _flag(4, "s: an expert is 1/s as wide as the dense FFN (--*-ffn-embed-dim / s)")
    moe_shared_experts: int = _flag(
        0, "n: experts that compute every token beside those that it chooses, as one FFN n times as wide "
        "(DeepSeekMoE); not among the E of --moe-num-experts"
    )  # fmt: skip
    moe_router_hidden_dim: int = _flag(
        0, "a router's scores are W2 relu(W1 x + b1), with so many hidden units (what xmoe-convert "
        "--router-hidden-dim fits); 0 = linear, W x"
    )  # fmt: skip
    moe_router_temperature: float = _flag(
        1.0, "divides a router's scores, in training and evaluation; below 1 = more decisive from the start; "
        "1e-6 to 1e6"
    )  # fmt: skip
    moe_router_init_scale: float = _flag(1.0, "multiplies a router's initial weight; 1e-6 to 1e6")
    moe_combine: str = _flag(
        "probs", "a chosen expert's output counts as often as it is probable (probs), as it is among "
        f"the chosen (normalized; only --moe-router {takers_of('normalized')}), or once (ones; what "
        f"xmoe-convert makes of a dense model; only --moe-router {takers_of('ones')})"
    )  # fmt: skip
    moe_output_scale: float = _flag(
        1.0, "multiplies what the chosen experts add up to, not shared, zero, copy or constant ones; 1e-6 to "
        "1e6. With probs that is far less at the start than a dense FFN's output, the less the more experts "
        "there are"
    )  # fmt: skip
    moe_kernel: str = _flag(
        AUTO, f"what computes the experts: {', '.join(kernel_names())}; auto chooses by device, precision, "
        "size and activation; others are for tests and benchmarks, and a checkpoint opens with auto again"
    )  # fmt: skip
    moe_capacity_factor: float = _flag(
        0.0, "in training an expert keeps at most ceil(tokens / experts x this) tokens; 0 = dropless"
    )
    moe_eval_capacity_factor: float = _flag(
        0.0, "the same in evaluation; other than 0 results depend on the batch and a decoder is not causal"
    )
    moe_min_capacity: int = _flag(4, "with a capacity factor: an expert may always keep this many tokens")
    moe_expert_parallel_size: int = _flag(
        1, "N: share out the experts among N ranks, E/N on each; 1 = every rank holds all, -1 = all ranks; "
        "must divide the number of ranks and --moe-num-experts"
    )  # fmt: skip
    moe_sharded_checkpoints: bool = _flag(
        False, "--moe-expert-parallel-size: each rank saves its experts in a file of its own, for models "
        "too large for one; xmoe-checkpoint merge makes one file of them"
    )  # fmt: skip


RouterFlags: Any = make_dataclass(
    "RouterFlags",
    [
        (f.name, kind_of(f.default), _flag(f.default, f"--moe-router {', '.join(takers)}: {f.help}"))
        for f, takers in flags_of_routers().items()
    ],
    bases=(CommonFlags,),
)


@dataclass
class MoEConfig(RouterFlags):
    """Fields that the dataclasses of both models inherit; fairseq turns them into flags."""

    def _get_help(self, name: str) -> Any:
        """fairseq's; the routers are those that are registered when help is asked for."""
        text = super()._get_help(name)
        if name != "moe_router":
            return text
        known = [f"{router} ({kind.description})" for router, kind in registered_routers().items()]
        return f"{text}: {', '.join(known)}".replace("%", "%%")  # argparse formats it

    def has_experts(self, side: str) -> bool:
        return bool(self.moe_freq) and not getattr(self, f"no_moe_{side}")


def settled_config(model_cfg: Any) -> MoEConfig:
    """A model's MoE fields, unchecked, with what its router makes of those that leave a choice to it."""
    names = {f.name: f.default for f in fields(MoEConfig) if f.name != "_name"}
    config = MoEConfig(**{name: read_field(model_cfg, name, default) for name, default in names.items()})
    return replace(config, **registered_routers().get(config.moe_router, RouterKind).settle(config))


def read_field(model_cfg: Any, name: str, default: Any) -> Any:
    value = model_cfg.get(name) if isinstance(model_cfg, Mapping) else getattr(model_cfg, name, None)
    value = default if value is None else value
    return value.value if isinstance(value, Enum) else value
