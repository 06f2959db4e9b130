"""What the training scripts train: the models of the paper's tables at four sizes, as fairseq-train's flags.

tiny: the demo's size, on the CPU in minutes. claims: the CPU too, the grid of docs/results.md. small: one
GPU, sized for about an hour. paper: the paper's settings (arXiv 2403.18926), with its capacity factors and
without a cap on experts per token.
"""

from dataclasses import dataclass

ADAM = "--optimizer adam --lr-scheduler"
CLAIMS = (
    f"{ADAM} polynomial_decay --warmup-updates 100 --total-num-update 1000 --max-update 1000 "
    "--save-interval-updates 250 --keep-interval-updates 1 --validate-interval 1000000 "
    "--no-epoch-checkpoints --log-interval 25"
)
INTERVALS = "--validate-interval 1000000 --no-epoch-checkpoints --keep-interval-updates 5"


@dataclass(frozen=True)
class Model:
    """How a token meets an FFN; each computes as much for it as the dense FFN, or less."""

    router: str = ""  # --moe-router; none: the model is dense
    split: int = 1  # s of the dense FFN
    flags: str = ""  # more of fairseq-train's
    wide: bool = False  # dense, with as many parameters as the models with experts, in wider FFNs
    cut: bool = False  # its experts are the dense FFN itself, all used in training: t is lowered afterwards
    max_batch: int = 0  # tokens, where memory or time grow faster than they; 0: the preset's


MODELS = {
    "dense": Model(),
    "dense-wide": Model(wide=True),
    "switch": Model("topk", flags="--moe-topk 1"),
    "hash": Model("hash"),
    "base": Model("base", max_batch=1024),  # its assignment takes the cube of the tokens in time
    "gshard": Model("gshard", 2, max_batch=4096),  # and it their square in memory
    "expert-choice": Model("expert_choice", 2),
    "topk-s2": Model("topk", 2),
    "topk-s4": Model("topk", 4),
    "topk-s8": Model("topk", 8),
    "xmoe-s1": Model("threshold", 1),
    "xmoe-s2": Model("threshold", 2),
    "xmoe-s4": Model("threshold", 4),
    "xmoe-s8": Model("threshold", 8),
    "split-s8": Model("threshold", 8, "--moe-threshold 1 --moe-max-experts-per-token 0", cut=True),
    # Half the dense FFN's FLOPs, from the first update on.
    "xmoe-s4-budget": Model("threshold", 4, "--moe-target-experts-per-token 2"),
    "xmoe-s8-budget": Model("threshold", 8, "--moe-target-experts-per-token 4"),
}


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
