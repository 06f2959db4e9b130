"""fairseq's Transformer layers with an MoE layer where the FFN was."""

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any

import torch
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xmoe_fairseq.build_moe import build_moe
from xmoe_fairseq.config import MoEConfig, router_kind
from xmoe_fairseq.moe import RoutedLayer, keep_scores, moe_layers
from xmoe_fairseq.parallel.groups import ExpertParallel, expert_parallel, spread_experts
from xmoe_fairseq.parallel.trainer import ExpertParallelTrainer
from xmoe_fairseq.token_ids import TokenIds
from xmoe_fairseq.trainer import MoETrainer


def install_experts(model: nn.Module, config: MoEConfig, sides: tuple[str, ...]) -> None:
    """Put MoE layers into a fairseq model, in place; each rank of a run gets the experts that it holds."""
    if not any(config.has_experts(side) for side in sides):
        return
    parallel, numbers = expert_parallel(config), count()
    for side in sides:
        install_moe_layers(getattr(model, side), config, side, parallel, numbers)
    for layer in moe_layers(model):
        for parameter in layer.expert_parameters():
            parameter.is_expert = True  # type: ignore[attr-defined]  # see xmoe_fairseq_compat
    if parallel:
        spread_experts(model, parallel)
    # see xmoe_fairseq_compat
    model.trainer_class = ExpertParallelTrainer if parallel else MoETrainer  # type: ignore[assignment]


def install_moe_layers(
    stack: nn.Module, config: MoEConfig, side: str, parallel: ExpertParallel | None, numbers: Iterator[int]
) -> None:
    """Replace every Nth layer of a fairseq encoder or decoder, in place; other layers stay fairseq's own.

    Args:
        stack: TransformerEncoderBase or TransformerDecoderBase.
        side: "encoder" or "decoder"; begins the layers' names in errors and statistics.
        numbers: of the model's MoE layers, from the encoder's first on.
    """
    if not config.has_experts(side):
        return
    ids = TokenIds(stack, side) if router_kind(config.moe_router).goes_by_ids else None
    for index in range(config.moe_freq - 1, len(stack.layers), config.moe_freq):
        moe = build_moe(stack, config, side, parallel, f"{side}.layers.{index}", next(numbers))
        layer: nn.Module
        if side == "encoder":
            layer = MoEEncoderLayer(stack.cfg, moe)
        else:
            layer = MoEDecoderLayer(stack.cfg, moe, no_encoder_attn=stack.layers[index].encoder_attn is None)
        layer.dropout_module.module_name = stack.layers[index].dropout_module.module_name
        if stack.cfg.checkpoint_activations:
            checkpoint_activations(layer, offload_to_cpu=stack.cfg.offload_activations)
        if ids:
            ids.hand_to(layer)
        stack.layers[index] = layer


def checkpoint_activations(layer: nn.Module, offload_to_cpu: bool) -> None:
    """Recompute the layer in the backward pass, but not what its router chose.

    Not fairseq's checkpoint_wrapper: that runs the first forward without a graph, so a loss taken from
    inside the layer (load balance) would have no gradient.
    """
    # A partial of the bound method, not a closure: a deep copy of the model (EMA) must run its own layer.
    layer.forward = partial(_recompute, layer.forward, offload_to_cpu)


def _recompute(forward: Callable[..., Any], offload_to_cpu: bool, *args: Any, **kwargs: Any) -> Any:
    with torch.autograd.graph.save_on_cpu() if offload_to_cpu else nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, context_fn=keep_scores, **kwargs)


class _MoEFeedForward:
    """What both layers share: fairseq's forward computes fc2(dropout(activation(fc1(x)))); here fc1 is the
    whole MoE layer and the rest does nothing."""

    dropout_module: FairseqDropout

    def replace_ffn(self, moe: RoutedLayer) -> None:
        del self.fc1, self.fc2  # modules, which could not be overwritten by a method
        self.moe = moe
        self.fc1 = self.feed_forward
        self.fc2 = self.activation_fn = self.activation_dropout_module = nn.Identity()
        self._padding_mask: Tensor | None = None  # of the call that runs
        self._token_ids: Tensor | None = None

    def make_generation_fast_(
        self, name: str = "", retain_dropout: bool = False,
        retain_dropout_modules: Collection[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """fairseq calls this for evaluation; of --retain-dropout it tells modules of its own only."""
        asked = retain_dropout_modules is None or self.dropout_module.module_name in retain_dropout_modules
        if retain_dropout and asked:
            self.moe.retain_dropout()
        if hasattr(super(), "make_generation_fast_"):  # a decoder layer's
            super().make_generation_fast_(name=name, **kwargs)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x: (length, batch, D)."""
        mask, self._padding_mask = self._padding_mask, None
        ids, self._token_ids = self._token_ids, None
        if ids is not None:
            ids = ids[:, -x.size(0) :].transpose(0, 1)  # in incremental decoding x is the last token alone
        if getattr(self.moe, "router", self.moe).goes_by_sentence:
            ids = torch.arange(x.size(1), device=x.device).expand(x.shape[:2])
        y, _ = self.moe(x, None if mask is None else mask.transpose(0, 1), ids)
        return y


class MoEEncoderLayer(_MoEFeedForward, TransformerEncoderLayerBase):
    """Encoder layer; the FFN is an MoE layer that skips padding."""

    def __init__(self, cfg: TransformerConfig, moe: RoutedLayer) -> None:
        super().__init__(cfg)
        self.replace_ffn(moe)
        # Copies for a fast path that knows dense layers only.
        for module in ("in_proj", "out_proj", "fc1", "fc2"):
            delattr(self, f"{module}_weight")
            delattr(self, f"{module}_bias")
        self.can_use_fastpath = False

    def forward(
        self, x: Tensor, encoder_padding_mask: Tensor | None, attn_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> Any:  # fmt: skip
        self._padding_mask, self._token_ids = encoder_padding_mask, token_ids
        return super().forward(x, encoder_padding_mask, attn_mask)

    def _load_from_state_dict(self, *args: Any) -> None:
        # Stock code makes those copies from fc1 and fc2 here.
        nn.Module._load_from_state_dict(self, *args)


class MoEDecoderLayer(_MoEFeedForward, TransformerDecoderLayerBase):
    """Decoder layer; the FFN is an MoE layer that skips padding."""

    def __init__(self, cfg: TransformerConfig, moe: RoutedLayer, no_encoder_attn: bool = False) -> None:
        super().__init__(cfg, no_encoder_attn)
        self.replace_ffn(moe)

    def forward(self, x: Tensor, *args: Any, token_ids: Tensor | None = None, **kwargs: Any) -> Any:
        self._padding_mask, self._token_ids = kwargs.get("self_attn_padding_mask"), token_ids
        return super().forward(x, *args, **kwargs)
