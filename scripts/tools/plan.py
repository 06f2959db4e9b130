"""What a model of presets.py means for one training: its arithmetic, and fairseq-train's flags."""

import json
import shlex
from dataclasses import dataclass

from presets import BEST_BY_BLEU, LENGTHS, MODELS, PRESETS, TASK_FLAGS, Model, Preset


@dataclass(frozen=True)
class Plan:
    """One model at one size on so many GPUs: the arithmetic, and the flags."""

    task: str
    preset: str
    model: str
    gpus: int  # processes; 1 on the CPU

    @property
    def size(self) -> Preset:
        return PRESETS[self.task][self.preset]

    @property
    def kind(self) -> Model:
        return MODELS[self.model]

    @property
    def is_dense(self) -> bool:
        return not self.kind.router

    @property
    def dense_flops(self) -> float:
        """Of a dense model's FFNs, over those of `dense`."""
        return self.size.wide_ffn / self.size.ffn_dim if self.kind.wide else 1.0

    @property
    def split(self) -> int:
        return self.kind.split

    @property
    def num_experts(self) -> int:
        return self.split * (1 if self.kind.cut else self.size.experts)

    @property
    def batch(self) -> int:
        return min(self.size.batch, self.kind.max_batch or self.size.batch)

    @property
    def update_freq(self) -> int:
        return self.size.tokens_per_update // (self.gpus * self.batch)

    def check(self) -> "Plan":
        """Raises ValueError: one line that names the rule."""
        for what, value, known in (
            ("PRESET", self.preset, PRESETS[self.task]),
            ("MODEL", self.model, MODELS),
        ):
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {value}")
        if self.task == "lm" and self.kind.router == "expert_choice":
            rule = "cannot be used in a language model: a token would see later ones"
            raise ValueError(f"{self.model} {rule}")
        if self.kind.wide and not self.size.wide_ffn:
            raise ValueError(f"{self.model} is a model of the preset claims, got {self.preset}")
        if self.gpus < 1 or self.size.tokens_per_update % (self.gpus * self.batch):
            whole = f"{self.size.tokens_per_update:,} tokens per update into batches of {self.batch:,}"
            raise ValueError(f"GPUS must divide {whole}, got {self.gpus}")
        return self

    def lines(self) -> list[str]:
        """What will be trained, and how many tokens an update has."""
        size, experts = self.size, self.num_experts
        width = size.ffn_dim // self.split
        layer = "dense" if self.is_dense else f"{experts} experts x {width}"
        device = "process on the CPU" if size.on_cpu else "GPU" + "s" * (self.gpus > 1)
        ffn = size.wide_ffn if self.kind.wide else size.ffn_dim
        return [
            f"{self.model}: {size.shape}, FFN {ffn}; {layer}",
            f"{self.gpus} {device} x {self.batch:,} tokens x update-freq {self.update_freq} = "
            f"{self.gpus * self.batch * self.update_freq:,} tokens per update; {size.length}",
        ]

    def flags(self) -> list[str]:
        size, kind = self.size, self.kind
        router = f"--moe-router {kind.router}" if kind.router else "--moe-freq 0"
        words = f"{TASK_FLAGS[self.task]} {size.flags} {router} {kind.flags} --update-freq {self.update_freq}"
        if kind.wide:
            side = "encoder" if self.task == "wmt" else "decoder"
            words += f" --{side}-ffn-embed-dim {size.wide_ffn}"
        if not self.is_dense:
            words += f" --moe-num-experts {self.num_experts} --moe-ffn-split {kind.split}"
        if kind.router == "threshold" and not kind.cut:
            words += f" --moe-threshold {size.threshold}"
            words += " --moe-max-experts-per-token 0" if size.as_paper else ""
        if size.as_paper and kind.router in ("threshold", "topk") and not kind.cut:
            words += f" --moe-capacity-factor {kind.split}"
        words += " --cpu --num-workers 0" if size.on_cpu else " --bf16"
        if self.task == "wmt":
            search = json.dumps({"beam": size.beam, **LENGTHS})
            words += f" --max-tokens {self.batch}"
            if size.eval_bleu:
                words += f" {BEST_BY_BLEU} --eval-bleu-args {shlex.quote(search)}"
        else:
            words += f" --tokens-per-sample {size.context} --batch-size {self.batch // size.context}"
        return shlex.split(words)
