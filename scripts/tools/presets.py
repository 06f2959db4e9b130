"""What the training scripts train: the models of the paper's tables at four sizes, as fairseq-train's flags.

tiny: the demo's size, on the CPU in minutes. claims: the CPU too, the grid of docs/results.md. small: one
GPU, sized for about an hour. paper: the paper's settings (arXiv 2403.18926), with its capacity factors and
without a cap on experts per token.
"""

import json
import shlex
from dataclasses import dataclass

ADAM = "--optimizer adam --lr-scheduler"
CLAIMS = (
    f"{ADAM} polynomial_decay --warmup-updates 100 --total-num-update 1000 --max-update 1000 "
    "--save-interval-updates 250 --keep-interval-updates 1 --validate-interval 1000000 "
    "--no-epoch-checkpoints --log-interval 25"
)
INTERVALS = "--validate-interval 1000000 --no-epoch-checkpoints --keep-interval-updates 5"

# The split s of the dense FFN, and the router. Each computes as much for a token as the dense FFN, or less.
MODELS = {
    "dense": (1, "--moe-freq 0"),
    "dense-wide": (1, "--moe-freq 0"),  # as many parameters as the models with experts, in wider FFNs
    "switch": (1, "--moe-router topk --moe-topk 1"),
    "hash": (1, "--moe-router hash"),
    "base": (1, "--moe-router base"),
    "gshard": (2, "--moe-router gshard"),
    "expert-choice": (2, "--moe-router expert_choice"),
    "topk-s2": (2, "--moe-router topk"),
    "topk-s4": (4, "--moe-router topk"),
    "topk-s8": (8, "--moe-router topk"),
    "xmoe-s1": (1, "--moe-router threshold"),
    "xmoe-s2": (2, "--moe-router threshold"),
    "xmoe-s4": (4, "--moe-router threshold"),
    "xmoe-s8": (8, "--moe-router threshold"),
    # The dense FFN itself cut into parts, all of which are used in training: t is lowered afterwards.
    "split-s8": (8, "--moe-router threshold --moe-threshold 1 --moe-max-experts-per-token 0"),
    # Half the dense FFN's FLOPs, from the first update on.
    "xmoe-s4-budget": (4, "--moe-router threshold --moe-target-experts-per-token 2"),
    "xmoe-s8-budget": (8, "--moe-router threshold --moe-target-experts-per-token 4"),
}
# gshard's memory grows with the square of the tokens in a batch, base's assignment takes their cube in time.
MAX_BATCH = {"gshard": 4096, "base": 1024}


@dataclass(frozen=True)
class Preset:
    """One size of one task."""

    shape: str  # the dense model in words
    ffn_dim: int
    experts: int  # of the dense FFN's width; a model with split s has s times as many
    batch: int  # tokens on one GPU in one forward pass
    tokens_per_update: int
    length: str
    threshold: float
    flags: str
    on_cpu: bool = False
    as_paper: bool = False  # its capacity factors, no cap
    wide_ffn: int = 0  # of dense-wide, where the preset has it
    beam: int = 5  # translation,
    eval_bleu: bool = True  # and whether each validation translates, to choose the best checkpoint by BLEU
    context: int = 0  # language models: tokens per sample,
    seen: int = 0  # and how many of these are context only when it is scored


TASK_FLAGS = {
    # Only the encoder has experts, as in the paper.
    "wmt": "--task translation --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 "
    "--adam-betas '(0.9, 0.98)' --no-moe-decoder --share-all-embeddings",
    "lm": "--task language_modeling --criterion moe_cross_entropy --adam-betas '(0.9, 0.95)' "
    "--weight-decay 0.1 --clip-norm 1.0 --share-decoder-input-output-embed",
}

# As in fairseq's examples: an untrained model would go on to the limit.
LENGTHS = {"max_len_a": 1.2, "max_len_b": 10}
# The best checkpoint is that of the best BLEU of text: sentencepiece's pieces are joined, and sacreBLEU
# tokenises (13a).
BEST_BY_BLEU = (
    "--eval-bleu --eval-bleu-remove-bpe sentencepiece --best-checkpoint-metric bleu "
    "--maximize-best-checkpoint-metric"
)

PRESETS = {
    "wmt": {
        "tiny": Preset(
            "2+2 layers, width 128, MoE in encoder layer 2", 256, 4, 600, 600, "1,000 updates", 0.5,
            "--arch xmoe_transformer_tiny --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 "
            "--encoder-attention-heads 4 --decoder-attention-heads 4 --encoder-normalize-before "
            f"--decoder-normalize-before --dropout 0 --clip-norm 1.0 {ADAM} polynomial_decay --lr 2e-3 "
            "--warmup-updates 150 --total-num-update 1000 --max-update 1000 --save-interval-updates 250 "
            f"{INTERVALS} --log-interval 25", on_cpu=True, beam=2,
        ),
        "claims": Preset(
            "4+1 layers, width 128, MoE in encoder layers 2, 4", 512, 8, 640, 640, "1,000 updates", 0.9,
            "--lr 3e-3 --arch xmoe_transformer_tiny --encoder-layers 4 --decoder-layers 1 "
            "--encoder-embed-dim 128 --encoder-ffn-embed-dim 512 --decoder-ffn-embed-dim 256 "
            "--encoder-attention-heads 4 --decoder-attention-heads 4 --encoder-normalize-before "
            "--decoder-normalize-before --dropout 0 "
            f"--clip-norm 1.0 {CLAIMS}", on_cpu=True, wide_ffn=1984, beam=1, eval_bleu=False,
        ),
        "small": Preset(
            "6+6 layers, width 512, MoE in encoder layers 2, 4, 6", 2048, 8,
            8192, 32768, "12,000 updates", 0.9,
            f"--arch xmoe_transformer_wmt_en_de --dropout 0.1 {ADAM} inverse_sqrt --lr 7e-4 "
            f"--warmup-updates 2000 --max-update 12000 --save-interval-updates 1000 {INTERVALS} "
            "--log-interval 100",
        ),
        "paper": Preset(
            "6+6 layers, width 512, MoE in encoder layers 2, 4, 6", 2048, 32,
            16384, 1048576, "10 epochs", 0.9,
            f"--arch xmoe_transformer_wmt_en_de --dropout 0.3 --weight-decay 1e-4 {ADAM} inverse_sqrt "
            "--lr 5e-4 --warmup-updates 512 --max-epoch 10 --keep-last-epochs 5 --log-interval 100",
            as_paper=True,
        ),
    },
    "lm": {
        "tiny": Preset(
            "2 layers, width 128, MoE in layer 2", 512, 4, 1024, 1024, "1,000 updates", 0.6,
            "--arch xmoe_transformer_lm_tiny --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 "
            f"--decoder-attention-heads 4 --dropout 0 {ADAM} polynomial_decay --lr 6e-3 --warmup-updates 100 "
            f"--total-num-update 1000 --max-update 1000 --save-interval-updates 250 {INTERVALS} "
            "--log-interval 25", on_cpu=True, context=128, seen=96,
        ),
        "claims": Preset(
            "4 layers, width 128, MoE in layers 2, 4", 512, 8, 640, 640, "1,000 updates", 0.9,
            "--lr 6e-3 --arch xmoe_transformer_lm_tiny --decoder-layers 4 --decoder-embed-dim 128 "
            f"--decoder-ffn-embed-dim 512 --decoder-attention-heads 4 --dropout 0 {CLAIMS}", on_cpu=True,
            wide_ffn=1984, context=128,
        ),
        "small": Preset(
            "12 layers, width 768, MoE in every 2nd layer", 3072, 8, 16384, 65536, "4,000 updates", 0.9,
            f"--arch xmoe_transformer_lm_gpt2_small {ADAM} cosine --lr 6e-4 --min-lr 6e-6 "
            f"--warmup-updates 400 --max-update 4000 --save-interval-updates 500 {INTERVALS} "
            "--log-interval 50",
            context=1024, seen=512,
        ),
        "paper": Preset(
            "12 layers, width 768, MoE in every 2nd layer", 3072, 8,
            16384, 262144, "60,000 updates", 0.9,
            f"--arch xmoe_transformer_lm_gpt2_small --init-std 0.014 {ADAM} cosine --lr 4.5e-4 "
            "--min-lr 4.5e-6 --warmup-updates 6000 --max-update 60000 --save-interval-updates 2000 "
            f"{INTERVALS} --log-interval 100", as_paper=True, context=1024,
        ),
    },
}  # fmt: skip


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
    def is_dense(self) -> bool:
        return self.model.startswith("dense")

    @property
    def split(self) -> int:
        return MODELS[self.model][0]

    @property
    def num_experts(self) -> int:
        return self.split * (1 if self.model.startswith("split") else self.size.experts)

    @property
    def batch(self) -> int:
        return min(self.size.batch, MAX_BATCH.get(self.model, self.size.batch))

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
        if self.task == "lm" and self.model == "expert-choice":
            raise ValueError("expert-choice cannot be used in a language model: a token would see later ones")
        if self.model == "dense-wide" and not self.size.wide_ffn:
            raise ValueError(f"dense-wide is a model of the preset claims, got {self.preset}")
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
        ffn = size.wide_ffn if self.model == "dense-wide" else size.ffn_dim
        return [
            f"{self.model}: {size.shape}, FFN {ffn}; {layer}",
            f"{self.gpus} {device} x {self.batch:,} tokens x update-freq {self.update_freq} = "
            f"{self.gpus * self.batch * self.update_freq:,} tokens per update; {size.length}",
        ]

    def flags(self) -> list[str]:
        size, (split, router) = self.size, MODELS[self.model]
        words = f"{TASK_FLAGS[self.task]} {size.flags} {router} --update-freq {self.update_freq}"
        if self.model == "dense-wide":
            side = "encoder" if self.task == "wmt" else "decoder"
            words += f" --{side}-ffn-embed-dim {size.wide_ffn}"
        if not self.is_dense:
            words += f" --moe-num-experts {self.num_experts} --moe-ffn-split {split}"
        if self.model.startswith("xmoe"):
            words += f" --moe-threshold {size.threshold}"
            words += " --moe-max-experts-per-token 0" if size.as_paper else ""
        if size.as_paper and self.model.startswith(("xmoe", "topk", "switch")):
            words += f" --moe-capacity-factor {split}"
        words += " --cpu --num-workers 0" if size.on_cpu else " --bf16"
        if self.task == "wmt":
            search = json.dumps({"beam": size.beam, **LENGTHS})
            words += f" --max-tokens {self.batch}"
            if size.eval_bleu:
                words += f" {BEST_BY_BLEU} --eval-bleu-args {shlex.quote(search)}"
        else:
            words += f" --tokens-per-sample {size.context} --batch-size {self.batch // size.context}"
        return shlex.split(words)
