"""Models of several sizes, batches for them, and fairseq's trainer, as fairseq-train makes them of flags."""

import copy
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from fairseq import options
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer
from torch import Tensor, nn

import xmoe_fairseq  # noqa: F401  (registers the models and criterions)
from benchmarks.subjects import transformers_block
from experiments.plan import Plan
from xmoe_fairseq.moe import RoutedLayer, moe_layers, record_routing

Sample = dict[str, Any]
LENGTHS = (20, 30)  # subwords of a sentence; fairseq puts sentences of about the same length into a batch
BATCHES = 4
MODEL = "xmoe-s4-budget"  # half of the dense FFN's FLOPs
# As the paper's preset, for a CPU.
WMT = (
    "--task translation --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 "
    "--share-all-embeddings --dropout 0.1 --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 1e-4 "
    "--clip-norm 1.0 --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 512 --max-tokens 1920 --cpu "
)


@dataclass(frozen=True)
class Size:
    flags: Callable[[], list[str]]  # of fairseq-train
    vocabulary: int = 4000
    repeats: int = 1  # rounds in place of one


SIZES = {
    "demo-mt": Size(lambda: Plan("wmt", "tiny", MODEL).flags(), repeats=4),
    "demo-lm": Size(lambda: Plan("lm", "tiny", MODEL).flags(), repeats=4),
    "claims-lm": Size(lambda: Plan("lm", "claims", MODEL).flags(["--batch-size", "8"]), repeats=4),
    "code": Size(  # at which the authors' code was timed
        lambda: shlex.split(
            WMT + "--arch xmoe_transformer_tiny --encoder-layers 4 --decoder-layers 2 "
            "--encoder-embed-dim 256 --encoder-ffn-embed-dim 1024 --encoder-attention-heads 4 "
            "--decoder-ffn-embed-dim 1024 --decoder-attention-heads 4 --no-moe-decoder "
            "--moe-num-experts 32 --moe-ffn-split 4 --moe-target-experts-per-token 2 "
            "--moe-threshold-rule mass"
        )
    ),
    "wmt": Size(
        lambda: shlex.split(
            WMT + "--arch xmoe_transformer_wmt_en_de --encoder-layers 2 --decoder-layers 2 "
            "--moe-num-experts 64 --moe-ffn-split 8 --moe-target-experts-per-token 4 "
            "--moe-threshold-rule mass"
        ),
        vocabulary=8000,
    ),
}  # fmt: skip


class Setup:
    """A size's flags, task and batches.

    Args:
        more: further flags of fairseq-train, which take the place of the size's.
    """

    def __init__(self, size: Size, more: list[str]) -> None:
        self.size, self.flags = size, ["no-data", *size.flags(), *more]
        self.configured: dict[str, Any] = {}
        self.words = Dictionary()
        for i in range(size.vocabulary - len(self.words)):
            self.words.add_symbol(f"word{i}")
        cfg = self.cfg()
        dictionaries = (self.words, self.words)
        self.is_translation = cfg.task._name == "translation"
        self.task: Any = (TranslationTask if self.is_translation else LanguageModelingTask)(
            cfg.task, *dictionaries
        )
        self.batches = [self.batch(cfg) for _ in range(BATCHES)]
        self.model_cfg = cfg.model

    def cfg(self, more: str = "") -> Any:
        if more not in self.configured:  # a third of a second
            parsed = options.parse_args_and_arch(options.get_training_parser(), [*self.flags, *more.split()])
            self.configured[more] = convert_namespace_to_omegaconf(parsed)
        return copy.deepcopy(self.configured[more])

    def model(self, more: str = "") -> nn.Module:
        model: nn.Module = self.task.build_model(self.cfg(more).model)
        return model.train()

    def trainer(self, model: nn.Module) -> Trainer:
        return Trainer(self.cfg(), self.task, model, self.criterion())

    def criterion(self) -> nn.Module:
        criterion: nn.Module = self.task.build_criterion(self.cfg().criterion)
        return criterion

    def batch(self, cfg: Any) -> Sample:
        """Words as frequent as Zipf has it."""
        frequency = 1 / torch.arange(1, len(self.words) - self.words.nspecial + 1)

        def text(length: int) -> Tensor:
            drawn = torch.multinomial(frequency, length - 1, True) + self.words.nspecial
            return torch.cat([drawn, torch.tensor([self.words.eos()])])

        if not self.is_translation:
            shape = (cfg.dataset.batch_size, cfg.task.tokens_per_sample)
            target = torch.stack([text(shape[1]) for _ in range(shape[0])])
            lengths = torch.full(shape[:1], shape[1])
            inputs = {"src_tokens": target.roll(1, dims=1), "src_lengths": lengths}
            return {"net_input": inputs, "target": target, "ntokens": target.numel(), "nsentences": shape[0]}
        sentences = cfg.dataset.max_tokens // LENGTHS[1]
        lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (2, sentences)).tolist()
        source, target = ([text(n) for n in each] for each in lengths)
        data = LanguagePairDataset(source, lengths[0], self.words, target, lengths[1], self.words)
        return data.collater([data[i] for i in range(len(data))])


def updates(trainer: Trainer, batches: list[Sample]) -> Callable[[], None]:
    """What fairseq-train does with a batch: an update by the trainer, its statistics included."""
    samples = cycle(batches)
    return lambda: trainer.train_step([next(samples)])


def places(sparse: nn.Module) -> dict[str, RoutedLayer]:
    """The Transformer layers that have experts, by name."""
    found = {name: module for name, module in sparse.named_modules() if isinstance(module, RoutedLayer)}
    return {name.rpartition(".")[0]: module for name, module in found.items()}


def with_narrow_ffns(setup: Setup, sparse: nn.Module) -> nn.Module:
    """Dense, where the experts are only as wide as those together that a token takes."""
    dense, taken = setup.model("--moe-freq 0"), setup.model_cfg.moe_target_experts_per_token
    for name, moe in places(sparse).items():
        layer: Any = dense.get_submodule(name)
        width = round(taken * moe.expert_dim)
        layer.fc1, layer.fc2 = nn.Linear(moe.model_dim, width), nn.Linear(width, moe.model_dim)
    return dense


def with_transformers_blocks(setup: Setup, sparse: nn.Module) -> nn.Module | None:
    """Dense, but for Hugging Face's blocks where the experts are. They take padding for tokens."""
    dense, taken = setup.model("--moe-freq 0"), round(setup.model_cfg.moe_target_experts_per_token)
    for name, moe in places(sparse).items():
        sizes = (moe.model_dim, moe.num_experts, moe.expert_dim, taken)
        block = transformers_block(*sizes, "grouped_mm")
        if block is None:
            return None
        layer: Any = dense.get_submodule(name)
        layer.fc1, layer.fc2 = block, nn.Identity()
    return dense


def experts_per_token(setup: Setup, model: nn.Module) -> float:
    """On average over layers, of the first batch."""
    with torch.no_grad(), record_routing(model) as records:
        model(**setup.batches[0]["net_input"])
    return float(sum(r.experts_per_token for _, r in records) / len(moe_layers(model)))
