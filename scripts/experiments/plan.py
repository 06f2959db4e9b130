"""What a model of models.toml means at a preset's size: its arithmetic, and fairseq-train's flags."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from experiments import catalogue
from experiments.catalogue import Flags, LanguageModelPreset, Model, Preset, TranslationPreset
from xmoe_fairseq_compat.errors import FlagError

# As in fairseq's examples: an untrained model would go on to the limit.
LENGTHS = {"max_len_a": 1.2, "max_len_b": 10}
# The best checkpoint is that of the best BLEU of text: sentencepiece's pieces are joined, and sacreBLEU
# tokenises (13a).
BEST_BY_BLEU: Flags = {
    "eval-bleu": True, "eval-bleu-remove-bpe": "sentencepiece", "best-checkpoint-metric": "bleu",
    "maximize-best-checkpoint-metric": True,
}  # fmt: skip
BUDGETS = {"moe-target-experts-per-token", "moe-layer-thresholds"}  # in the place of --moe-threshold

Record = TypeVar("Record")


def one_of(what: str, name: str, known: dict[str, Record]) -> Record:
    if name not in known:
        raise FlagError(f"{what} must be one of {', '.join(known)}, got {name} (--help explains them)")
    return known[name]


def given(words: Sequence[str]) -> Flags:
    """Flags on a command line, without the dashes; "" where no value follows."""
    found: Flags = {}
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = value or following * (not following.startswith("--"))
    return found


@dataclass(frozen=True)
class Plan:
    """One model at one size on so many GPUs.

    Raises:
        FlagError: one line that names the rule.
    """

    task: str
    preset: str
    model: str
    gpus: int = 1  # processes; 1 on the CPU
    moved_to_gpus: bool = False  # a preset for the CPU; its precision stays, fp32

    def __post_init__(self) -> None:
        size, method = self.size, self.method
        whole = f"{size.update_tokens:,} tokens per update into batches of {self.batch_tokens:,}"
        uneven = self.gpus < 1 or size.update_tokens % (self.gpus * self.batch_tokens)
        own = f"{self.preset} is a preset of fairseq's own model: MODEL must be dense"
        for broken, rule in (
            (self.task == "lm" and not method.causal,
             f"{self.model} cannot be used in a language model: a token would see later ones"),
            (method.kind == "wide" and not size.wide_ffn_dim,
             f"{self.model} wants a preset with wide_ffn_dim, such as claims of lm, got {self.preset}"),
            (not size.experts and method.kind != "dense", f"{own}, got {self.model}"),
            (uneven, f"GPUS must divide {whole}, got {self.gpus}"),
        ):  # fmt: skip
            if broken:
                raise FlagError(rule)

    @classmethod
    def of_run(cls, about: dict[str, Any]) -> "Plan":
        """
        Args:
            about: what train.py has noted (`results.read_run`).
        """
        gpus, moved = about.get("gpus", 1), about.get("moved_to_gpus", False)
        return cls(about["task"], about["preset"], about["model"], gpus, moved)

    @cached_property
    def size(self) -> Preset:
        return one_of("PRESET", self.preset, catalogue.presets(self.task))

    @cached_property
    def method(self) -> Model:
        return one_of("MODEL", self.model, catalogue.models())

    @property
    def on_cpu(self) -> bool:
        return self.size.cpu and not self.moved_to_gpus

    @property
    def is_dense(self) -> bool:
        return self.method.kind in ("dense", "wide")

    @property
    def ffn_dim(self) -> int:
        return self.size.wide_ffn_dim if self.method.kind == "wide" else self.size.ffn_dim

    @property
    def num_experts(self) -> int:
        return self.method.split * (1 if self.method.kind == "split" else self.size.experts)

    @property
    def batch_tokens(self) -> int:
        """The preset's, or the largest equal parts of it that the model can take."""
        whole = self.size.batch_tokens
        parts = math.ceil(whole / (self.method.max_batch_tokens or whole))
        return whole // next(n for n in range(parts, whole + 1) if whole % n == 0)

    @property
    def update_freq(self) -> int:
        return self.size.update_tokens // (self.gpus * self.batch_tokens)

    def lines(self, more: Sequence[str] = ()) -> list[str]:
        """What will be trained, and how many tokens an update has.

        Args:
            more: as for `flags`.
        """
        size = self.size
        width = size.ffn_dim // self.method.split
        layer = "dense" if self.is_dense else f"{self.num_experts} experts x {width}"
        device = "process on the CPU" if self.on_cpu else "GPU" + "s" * (self.gpus > 1)
        return [
            f"{self.model}: {size.about}, FFN {self.ffn_dim}; {layer}",
            f"{self.gpus} {device} x {self.batch_tokens:,} tokens x update-freq {self.update_freq} = "
            f"{self.gpus * self.batch_tokens * self.update_freq:,} tokens per update; "
            f"{catalogue.length(size.flags | given(more))}",
        ]

    def flags(self, more: Sequence[str] = ()) -> list[str]:
        """
        Args:
            more: further flags of fairseq-train, which take the place of those of the same name.
        """
        size, method = self.size, self.method
        flags = catalogue.task_flags(self.task) | size.flags | {"update-freq": self.update_freq}
        flags |= {"num-workers": 0} if size.cpu else {"bf16": True}
        flags["cpu"] = self.on_cpu
        if interval := flags.get(
            "save-interval-updates"
        ):  # else fairseq leaves it out at the end of an epoch
            flags["validate-interval-updates"] = interval
        if method.kind == "wide":
            flags[("encoder" if self.task == "wmt" else "decoder") + "-ffn-embed-dim"] = self.ffn_dim
        if not self.is_dense:
            flags |= {"moe-num-experts": self.num_experts, "moe-ffn-split": method.split}
            flags |= size.routers.get(catalogue.router_of(method), {})
        if size.paper_capacity and method.capacity:
            flags["moe-capacity-factor"] = method.split
        if size.experts:
            flags |= method.flags
        flags |= self.batch_flags(
            not (size.flags.get("disable-validation") or "--disable-validation" in more)
        )
        asked = method.flags | given(more)
        if BUDGETS & {*asked} or asked.get("moe-threshold-rule", "mass") not in ("mass", "auto"):
            flags.pop("moe-threshold", None)  # the preset's: of a mass, and not to be combined with them
        words: list[str] = []
        for name, value in flags.items():
            if name not in given(more) and value is not False:
                words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return [*words, *more]

    def batch_flags(self, validates: bool) -> Flags:
        size = self.size
        if isinstance(size, LanguageModelPreset):
            return {
                "tokens-per-sample": size.sample_tokens,
                "batch-size": self.batch_tokens // size.sample_tokens,
            }
        flags: Flags = {"max-tokens": self.batch_tokens}
        if isinstance(size, TranslationPreset) and size.best_by_bleu and validates:
            flags |= BEST_BY_BLEU | {"eval-bleu-args": json.dumps({"beam": size.beam, **LENGTHS})}
        return flags
