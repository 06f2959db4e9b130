"""A translation model, its criterion, its optimizer and a batch, as fairseq-train makes them of flags."""

import copy
import shlex
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import optim, options
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.translation import TranslationTask
from torch import nn

import xmoe_fairseq  # noqa: F401  (registers the models and criterions)
from xmoe_fairseq.moe import record_routing
from xmoe_fairseq.moe.capacity import expert_capacity, keep_within_capacity

Sample = dict[str, Any]
SIDES = ("encoder", "both")  # the paper's, and fairseq-train's without --no-moe-decoder
LENGTHS = (20, 30)  # subwords of a sentence; fairseq puts sentences of about the same length into a batch

# The preset `paper` of scripts/experiments. The learning rate is 0: an update computes all that it ever does,
# and the routing stays as it was set.
FLAGS = (
    "no-data --task translation --arch xmoe_transformer_wmt_en_de --share-all-embeddings --dropout 0.1 "
    "--optimizer adam --adam-betas '(0.9, 0.98)' --lr 0 --weight-decay 1e-4 --clip-norm 1.0 "
    "--criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1"
)


@dataclass
class Setup:
    args: Namespace  # the benchmark's own flags
    moe_in: str  # one of SIDES
    cfg: Any  # fairseq's configuration
    task: TranslationTask
    criterion: nn.Module

    @property
    def shape(self) -> str:
        c, args = self.cfg.model, self.args
        return (
            f"{c.encoder_layers}+{c.decoder_layers} layers, width {c.encoder_embed_dim}, "
            f"FFN {c.encoder_ffn_embed_dim}, {c.encoder_attention_heads} heads, "
            f"MoE in every {c.moe_freq}. layer, "
            f"{args.experts} experts of width {c.encoder_ffn_embed_dim // args.split}, "
            f"capacity factor {args.capacity:g} in the paper's way, vocabulary {args.vocabulary}, "
            f"{args.sentences} sentences of {LENGTHS[0]} to {LENGTHS[1]} words"
        )

    def model(self, sparse: bool) -> nn.Module:
        model_cfg = copy.deepcopy(self.cfg.model)
        if not sparse:
            model_cfg.moe_freq = 0
        return self.task.build_model(model_cfg).train()

    def optimizer(self, model: nn.Module) -> Any:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return optim.build_optimizer(self.cfg.optimizer, parameters)


def build_setup(args: Namespace, moe_in: str) -> Setup:
    flags = [
        *shlex.split(FLAGS), *(["--no-moe-decoder"] if moe_in == "encoder" else []),
        "--encoder-layers", args.layers[0], "--decoder-layers", args.layers[1],
        "--moe-num-experts", args.experts, "--moe-ffn-split", args.split, "--moe-max-experts-per-token", 0,
        *shlex.split(args.flags),
    ]  # fmt: skip
    parsed = options.parse_args_and_arch(options.get_training_parser(), [str(flag) for flag in flags])
    cfg = convert_namespace_to_omegaconf(parsed)
    words = Dictionary()
    for i in range(args.vocabulary - len(words)):
        words.add_symbol(f"word{i}")
    task = TranslationTask(cfg.task, words, words)
    return Setup(args, moe_in, cfg, task, task.build_criterion(cfg.criterion))


def batch(setup: Setup, sentences: int) -> Sample:
    """Words as frequent as Zipf has it; fairseq's collater pads them."""
    words = setup.task.source_dictionary
    frequency = 1 / torch.arange(1, len(words) - words.nspecial + 1)

    def sides() -> list[torch.Tensor]:
        lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (sentences,)).tolist()
        drawn = (torch.multinomial(frequency, length - 1, True) + words.nspecial for length in lengths)
        return [torch.cat([text, torch.tensor([words.eos()])]) for text in drawn]

    source, target = sides(), sides()
    data = LanguagePairDataset(
        source, list(map(len, source)), words, target, list(map(len, target)), words, left_pad_source=True
    )
    return data.collater([data[i] for i in range(len(data))])


def dropped_share(model: nn.Module, setup: Setup, sample: Sample) -> float:
    """Of the (token, expert) pairs that the routers chose, how many the capacity drops."""
    with torch.no_grad(), record_routing(model) as records:
        setup.criterion(model, sample)
    wanted = sum(routing.rows_wanted for _, routing in records)
    kept = 0
    for _, routing in records:
        capacity = expert_capacity(routing.num_tokens, routing.num_experts, setup.args.capacity, 0)
        kept += keep_within_capacity(routing, capacity).token_R.numel()
    return 1 - kept / wanted
